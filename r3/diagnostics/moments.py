"""Means and co-moments of two variables that merge without losing digits.

Plain sums of squares lose all digits of a standard deviation that is small beside the mean. Here a batch is centred on
its own mean, and two batches merge by the formula of Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means of x and y over n pairs, and the sums over them of squared deviations and of their product."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`[mean_x, mean_y, xx, yy, xy]` of float64 `[n]`, n > 0, as a tensor on their device."""
        pairs = torch.stack([x, y])
        mean = pairs.mean(1, keepdim=True)
        # The second step takes out the rounding of the first: equal values have deviations of exactly 0.
        mean = mean + (pairs - mean).mean(1, keepdim=True)
        dx, dy = pairs - mean
        return torch.cat([mean[:, 0], torch.stack([(dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()])])

    def merge(self, other: Self) -> Self:
        """The moments of both sets of pairs."""
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * (other.n / n)
        return type(self)(
            n=n,
            mean_x=self.mean_x + step_x * (other.n / n),
            mean_y=self.mean_y + step_y * (other.n / n),
            xx=self.xx + other.xx + step_x * step_x * weight,
            yy=self.yy + other.yy + step_y * step_y * weight,
            xy=self.xy + other.xy + step_x * step_y * weight,
        )

    def as_list(self) -> list[float]:
        """`[mean_x, mean_y, xx, yy, xy]`."""
        return [self.mean_x, self.mean_y, self.xx, self.yy, self.xy]

    @classmethod
    def from_list(cls, n: int, values: list[float]) -> Self:
        """The inverse of `as_list`."""
        mean_x, mean_y, xx, yy, xy = values
        return cls(n=n, mean_x=mean_x, mean_y=mean_y, xx=xx, yy=yy, xy=xy)

    @property
    def std_x(self) -> float:
        """Standard deviation of x, over n and not n - 1; NaN if there is no pair."""
        return math.sqrt(self.xx / self.n) if self.n else math.nan

    @property
    def std_y(self) -> float:
        """Standard deviation of y, over n and not n - 1; NaN if there is no pair."""
        return math.sqrt(self.yy / self.n) if self.n else math.nan

    @property
    def pearson(self) -> float:
        """Pearson's correlation of x and y; NaN if there are less than two pairs, or one of the two does not vary."""
        scale = math.sqrt(self.xx) * math.sqrt(self.yy)
        # Rounding may leave it a last bit beyond 1.
        return max(-1.0, min(1.0, self.xy / scale)) if scale else math.nan
