"""How far the trainer's log-probabilities are from the rollout's, over the same sampled tokens.

A difference is always d = train - rollout, in nats, so exp(d) is the importance ratio of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from r3.diagnostics.merging import MergeableSums
from r3.errors import SHOWN, DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self


def compare_logprobs(
    train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, *, extreme_ratio: float = 2.0
) -> dict[str, float]:
    """Token-weighted gap between two sides' log-probabilities of the same tokens.

    `train` and `rollout` are float tensors of one shape, any shape, in nats; `mask` is bool of that shape, and only
    tokens where it is true count: leave out prompts, padding and tokens that were not sampled. The rollout's
    log-probabilities have to be those of the distribution that was sampled from. See `LogprobSums.metrics` for the
    names, and `LogprobSums` to merge micro-batches and ranks.

    Raises `DiagnosticsError` for unequal shapes, other dtypes, and non-finite values where `mask` is true.

    >>> compare_logprobs(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]), torch.tensor([True, True]))["abs_mean"]
    0.25
    """
    return LogprobSums.from_tensors(train, rollout, mask, extreme_ratio=extreme_ratio).metrics()


@dataclass(frozen=True, kw_only=True)
class LogprobSums(MergeableSums):
    """Mergeable totals behind `compare_logprobs`; d is train minus rollout, in nats."""

    tokens: int = 0
    diff_sum: float = 0.0
    abs_sum: float = 0.0
    k3_sum: float = 0.0
    extreme: int = 0
    abs_max: float = 0.0
    extreme_ratio: float = 2.0

    maxima: ClassVar[int] = 1

    @classmethod
    def from_tensors(
        cls, train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, *, extreme_ratio: float = 2.0
    ) -> Self:
        """Totals of one batch, in float64; arguments and errors as in `compare_logprobs`."""
        _check(train, rollout, mask, extreme_ratio)
        diff = train.detach()[mask].double() - rollout.detach()[mask].double()
        finite = diff.isfinite()
        if not finite.all():
            raise DiagnosticsError(_non_finite(train, rollout, mask, ~finite))
        if not diff.numel():
            return cls.empty(extreme_ratio=extreme_ratio)
        # expm1 keeps the digits that exp(d) - 1 loses at small d. It never came out below d in 65 million values on a
        # CPU, but a library whose last bit is wrong would make k3 negative.
        k3 = (torch.expm1(diff) - diff).clamp_min(0)
        size = diff.abs()
        extreme = size > math.log(extreme_ratio)
        totals = torch.stack([diff.sum(), size.sum(), k3.sum(), extreme.sum().double(), size.max()])
        return cls.from_tensor(torch.cat([totals.new_tensor([diff.numel()]), totals]), extreme_ratio=extreme_ratio)

    @property
    def signature(self) -> dict[str, Any]:
        return {"extreme_ratio": self.extreme_ratio}

    def as_tensor(self) -> torch.Tensor:
        """`[tokens, diff_sum, abs_sum, k3_sum, extreme, abs_max]`, float64; only the last merges by maximum."""
        totals = [self.tokens, self.diff_sum, self.abs_sum, self.k3_sum, self.extreme, self.abs_max]
        return torch.tensor(totals, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, totals: torch.Tensor, *, extreme_ratio: float = 2.0) -> Self:
        """The inverse of `as_tensor`; the threshold is not among the totals."""
        tokens, diff_sum, abs_sum, k3_sum, extreme, abs_max = totals.tolist()
        return cls(
            tokens=int(tokens),
            diff_sum=diff_sum,
            abs_sum=abs_sum,
            k3_sum=k3_sum,
            extreme=int(extreme),
            abs_max=abs_max,
            extreme_ratio=extreme_ratio,
        )

    def with_totals(self, totals: torch.Tensor) -> Self:
        return self.from_tensor(totals, extreme_ratio=self.extreme_ratio)

    @classmethod
    def empty(cls, *, extreme_ratio: float = 2.0) -> Self:
        """The neutral element of `merge`: no tokens."""
        return cls(extreme_ratio=extreme_ratio)

    def metrics(self) -> dict[str, float]:
        """The gap between the two sides; all but `tokens` are NaN when there are no tokens.

        `tokens`        how many counted
        `abs_mean`      mean of |d|, nats
        `abs_max`       largest |d|, nats
        `k1`            mean of -d, nats: unbiased estimate of KL(rollout || train); may be negative
        `k3`            mean of exp(d) - 1 - d, nats: the same KL, never negative, less variance; infinite if d >= 710
        `extreme_frac`  share of tokens with exp(d) outside [1 / extreme_ratio, extreme_ratio]

        k1 and k3: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html
        """
        if not self.tokens:
            return {"tokens": 0.0} | dict.fromkeys(("abs_mean", "abs_max", "k1", "k3", "extreme_frac"), math.nan)
        return {
            "tokens": float(self.tokens),
            "abs_mean": self.abs_sum / self.tokens,
            "abs_max": self.abs_max,
            "k1": -self.diff_sum / self.tokens,
            "k3": self.k3_sum / self.tokens,
            "extreme_frac": self.extreme / self.tokens,
        }


def _check(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, extreme_ratio: float) -> None:
    problems = []
    if not train.shape == rollout.shape == mask.shape:
        shapes = f"train {list(train.shape)}, rollout {list(rollout.shape)}, mask {list(mask.shape)}"
        problems.append(f"shapes: expected three equal ones, got {shapes}; align them first, nothing is broadcast")
    if not train.device == rollout.device == mask.device:
        problems.append(f"devices: expected one, got {train.device}, {rollout.device}, {mask.device}; move them first")
    for name, tensor in (("train", train), ("rollout", rollout)):
        if not tensor.dtype.is_floating_point:
            problems.append(f"{name}: expected floating-point log-probabilities, got {tensor.dtype}")
    if mask.dtype != torch.bool:
        problems.append(f"mask: expected torch.bool, got {mask.dtype}; use mask.bool()")
    if not extreme_ratio > 1:
        problems.append(f"extreme_ratio: expected more than 1, got {extreme_ratio}")
    if problems:
        raise DiagnosticsError(f"log-probabilities cannot be compared:{summary(problems)}")


def _non_finite(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, bad: torch.Tensor) -> str:
    where = [tuple(position) for position in mask.nonzero()[bad.nonzero()[:SHOWN, 0]].tolist()]
    shown = [f"at {at}: train {train[at].item()}, rollout {rollout[at].item()}" for at in where]
    total = int(bad.sum())
    return (
        f"log-probabilities: expected finite values wherever the mask is true, got {total} of {len(bad)} tokens that "
        f"are not; mask out tokens that were not sampled, or find where they became non-finite. "
        f"{'First' if total > SHOWN else 'They are'}:{summary(shown)}"
    )
