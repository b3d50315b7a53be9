"""What a correction did, as totals that merge over micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import KONG, Metric

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class CorrectionSums(MergeableSums):
    """Mergeable totals of one correction; made by the functions of `r3.diagnostics.corrections`."""

    method: str
    low: float
    high: float
    drops: bool
    """Whether what is outside the bounds is dropped; otherwise it is clipped."""
    by_sequence: bool
    tokens: int = 0
    outside_tokens: int = 0
    sequences: int = 0
    outside_sequences: int = 0
    weight_sum: float = 0.0
    weight_square_sum: float = 0.0

    METRICS = (
        Metric(name="tokens", formula="N", unit="tokens"),
        Metric(
            name="{clipped,masked}_frac",
            formula="share of the N tokens whose ratio is outside the bounds",
            notes="`masked` if they are dropped; at the level of sequences a sequence's ratio is that of all its "
            "tokens",
        ),
        Metric(name="weight_mean", formula="(sum of w) / N"),
        Metric(
            name="ess",
            formula="(sum of w)² / (N · sum of w²)",
            notes="effective sample size over N, in [0, 1]: 1 if all weights are equal, 0 if all is dropped",
            source=KONG,
        ),
        Metric(
            name="sequences",
            formula="sequences with a token in the mask",
            unit="sequences",
            notes="at the level of sequences only; one that is spread over ranks counts once",
        ),
        Metric(name="seq_{clipped,masked}_frac", formula="share of those", notes="at the level of sequences only"),
    )

    @classmethod
    def empty_like(cls, other: CorrectionSums) -> CorrectionSums:
        """The neutral element of `merge` for sums of the kind of `other`."""
        return other.with_totals(torch.zeros(6, dtype=torch.float64))

    @property
    def signature(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "low": self.low,
            "high": self.high,
            "drops": self.drops,
            "by_sequence": self.by_sequence,
        }

    def as_tensor(self) -> torch.Tensor:
        """`[tokens, outside_tokens, sequences, outside_sequences, weight_sum, weight_square_sum]`, float64."""
        counts = [self.tokens, self.outside_tokens, self.sequences, self.outside_sequences]
        return torch.tensor([*counts, self.weight_sum, self.weight_square_sum], dtype=torch.float64)

    def with_totals(self, totals: torch.Tensor) -> Self:
        *counts, weight_sum, weight_square_sum = totals.tolist()
        tokens, outside_tokens, sequences, outside_sequences = map(int, counts)
        return type(self)(
            **self.signature,
            tokens=tokens,
            outside_tokens=outside_tokens,
            sequences=sequences,
            outside_sequences=outside_sequences,
            weight_sum=weight_sum,
            weight_square_sum=weight_square_sum,
        )

    def metrics(self) -> dict[str, float]:
        """By the names in `METRICS` that this kind of correction has; all but counts are NaN without tokens."""
        kind = "masked" if self.drops else "clipped"
        found = {
            "tokens": float(self.tokens),
            f"{kind}_frac": _ratio(self.outside_tokens, self.tokens),
            "weight_mean": _ratio(self.weight_sum, self.tokens),
            "ess": self._ess(),
        }
        if self.by_sequence:
            share = _ratio(self.outside_sequences, self.sequences)
            found |= {"sequences": float(self.sequences), f"seq_{kind}_frac": share}
        return found

    def _ess(self) -> float:
        if self.tokens and not self.weight_square_sum:
            return 0.0
        return _ratio(self.weight_sum**2, self.tokens * self.weight_square_sum)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
