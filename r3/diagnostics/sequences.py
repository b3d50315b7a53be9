"""How far whole sequences are apart: their log-probability is the sum of their tokens'.

A sequence may be spread over the rows of several forwards, or over the ranks of a sequence-parallel group: its totals
are added up first, and only then do they make a metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from r3.diagnostics.merging import MergeableSums, collective_device, same_on_all_ranks
from r3.diagnostics.metric import Metric
from r3.errors import SHOWN, DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self


def sequence_totals(
    values: torch.Tensor,
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    count: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of `values` by sequence, float64 `[count]`, and numbers of tokens, int64 `[count]`, on the values' device.

    Totals of several calls add up to those of their tokens together.

    Args:
        values: floating, any shape, d = train - rollout in nats for `SequenceSums`.
        mask: bool of that shape: which tokens count.
        sequence_ids: int64 of that shape, from 0 below `count` wherever the mask is True, any value elsewhere.
        count: number of sequences.
        group: ranks over which the sequences are spread; the totals are those of all of them, on each. None: this rank
            alone. With a group every rank of it calls this.

    Raises:
        DiagnosticsError: wrong shapes, dtypes, ids or values that are not finite, on all ranks of the group if on one;
            or ranks with different counts.
    """
    problems = _problems(values, mask, sequence_ids, count)
    sums, tokens = torch.zeros(2, max(count, 0), dtype=torch.float64, device=values.device)
    if not problems:
        where = mask.flatten().nonzero()[:, 0]
        ids = sequence_ids.flatten().index_select(0, where)
        found = values.detach().flatten().index_select(0, where).double()
        outside = (ids < 0) | (ids >= count)
        infinite = ~found.isfinite()
        n_outside, n_infinite = torch.stack([outside.sum(), infinite.sum()]).tolist()
        if n_outside:
            problems.append(
                f"sequence_ids: expected 0 to {count - 1} under the mask, got {ids[outside][:SHOWN].tolist()}"
            )
        if n_infinite:
            problems.append(
                f"values: expected finite ones under the mask, got {n_infinite} of {len(where)} that are not"
            )
        if not problems:
            sums.index_add_(0, ids, found)
            tokens.index_add_(0, ids, torch.ones_like(found))
    if group is not None:
        if not same_on_all_ranks(float(count), group):
            problems.append(f"count: expected the same on all ranks, got {count} on rank {dist.get_rank()}")
        if not same_on_all_ranks(float(bool(problems)), group) and not problems:
            problems.append("another rank of the group has found something wrong with its own")
    if problems:
        raise DiagnosticsError(f"totals of sequences cannot be made:{summary(problems)}")
    if group is not None:
        both = torch.stack([sums, tokens]).to(collective_device(group))
        dist.all_reduce(both, group=group)
        sums, tokens = both.to(values.device)
    return sums, tokens.long()


@dataclass(frozen=True, kw_only=True)
class SequenceSums(MergeableSums):
    """Mergeable totals over sequences of at least one token; s is the sum of d over a sequence's tokens."""

    sequences: int = 0
    chi2_sum: float = 0.0
    """Sum of exp(2 s) - 1."""
    ppl_ratio_sum: float = 0.0
    """Sum of exp(-s / tokens)."""
    log_ratio_max: float = 0.0

    maxima: ClassVar[int] = 1
    METRICS = (
        Metric(name="sequences", formula="how many have a token that counts", unit="sequences"),
        Metric(
            name="chi2_seq",
            formula="mean of exp(2 s) - 1",
            notes="χ² of whole sequences: grows with their length; infinite once an s reaches 355",
        ),
        Metric(
            name="seq_ppl_ratio",
            formula="mean of exp(-s / n)",
            notes="each sequence counts alike, unlike in `ppl_ratio`",
        ),
        Metric(name="seq_log_ratio_max", formula="max of abs(s)", unit="nats", notes="merges by maximum"),
    )

    @classmethod
    def from_totals(cls, diff_sum: torch.Tensor, tokens: torch.Tensor) -> Self:
        """Of `[n]` sums of d, train minus rollout in nats, and numbers of tokens, as `sequence_totals` gives them.

        Each sequence has to come in once: where ranks hold the same totals, all but one of them start from an empty
        `SequenceSums()`. Raises `DiagnosticsError` for other shapes, and for sums that are not finite.
        """
        if diff_sum.dim() != 1 or diff_sum.shape != tokens.shape or not diff_sum.dtype.is_floating_point:
            raise DiagnosticsError(
                f"expected floating diff_sum [n] and tokens [n], got {diff_sum.dtype} {list(diff_sum.shape)} and "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        # Of a few numbers a sequence; on the host from here on.
        length = tokens.cpu().double()
        counted = length > 0
        length, s = length[counted], diff_sum.detach().cpu().double()[counted]
        if not s.isfinite().all():
            bad = (counted.nonzero()[:, 0][~s.isfinite()]).tolist()
            raise DiagnosticsError(
                f"diff_sum: expected finite sums, got {len(bad)} of {len(s)} that are not, of sequences {bad[:SHOWN]}; "
                "find where log-probabilities became non-finite"
            )
        if not len(s):
            return cls()
        return cls(
            sequences=len(s),
            chi2_sum=float(torch.expm1(2 * s).sum()),
            ppl_ratio_sum=float(torch.exp(-s / length).sum()),
            log_ratio_max=float(s.abs().max()),
        )

    @property
    def signature(self) -> dict[str, Any]:
        return {}

    def as_tensor(self) -> torch.Tensor:
        """`[sequences, chi2_sum, ppl_ratio_sum, log_ratio_max]`, float64; only the last merges by maximum."""
        totals = [self.sequences, self.chi2_sum, self.ppl_ratio_sum, self.log_ratio_max]
        return torch.tensor(totals, dtype=torch.float64)

    def with_totals(self, totals: torch.Tensor) -> Self:
        sequences, chi2_sum, ppl_ratio_sum, log_ratio_max = totals.tolist()
        return type(self)(
            sequences=int(sequences), chi2_sum=chi2_sum, ppl_ratio_sum=ppl_ratio_sum, log_ratio_max=log_ratio_max
        )

    @classmethod
    def empty(cls) -> Self:
        """The neutral element of `merge`: no sequences."""
        return cls()

    def metrics(self) -> dict[str, float]:
        """The gap by sequence, by the names in `METRICS`; all but `sequences` are NaN when there are none."""
        n = self.sequences
        return {
            "sequences": float(n),
            "chi2_seq": self.chi2_sum / n if n else math.nan,
            "seq_ppl_ratio": self.ppl_ratio_sum / n if n else math.nan,
            "seq_log_ratio_max": self.log_ratio_max if n else math.nan,
        }


def _problems(values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor, count: int) -> list[str]:
    problems = []
    if not values.shape == mask.shape == sequence_ids.shape:
        shapes = f"values {list(values.shape)}, mask {list(mask.shape)}, sequence_ids {list(sequence_ids.shape)}"
        problems.append(f"shapes: expected three equal ones, got {shapes}")
    if not values.device == mask.device == sequence_ids.device:
        problems.append(f"devices: expected one, got {values.device}, {mask.device}, {sequence_ids.device}")
    if not values.dtype.is_floating_point:
        problems.append(f"values: expected floating-point ones, got {values.dtype}")
    if mask.dtype != torch.bool:
        problems.append(f"mask: expected torch.bool, got {mask.dtype}")
    if sequence_ids.dtype != torch.int64:
        problems.append(f"sequence_ids: expected torch.int64, got {sequence_ids.dtype}")
    if count < 0:
        problems.append(f"count: expected 0 or more sequences, got {count}")
    return problems
