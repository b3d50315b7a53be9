"""Totals that merge across micro-batches and ranks, so that no metric is ever a mean of means.

1. Every rank of the group must call `reduce`, also one that saw no tokens (use `empty`): a rank that stays away leaves
   the others waiting until the group's own timeout.
2. Counts stay exact up to 2**53; sums of floats depend on the order of merging in the last bits only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from r3.diagnostics.metric import Metric
from r3.errors import DiagnosticsError

if TYPE_CHECKING:
    from typing_extensions import Self


class MergeableSums(ABC):
    """Sums, counts and maxima of one metric family; subclasses are frozen dataclasses.

    A subclass lays its totals out as one float64 vector, the maxima last, and names in `signature` what has to be
    equal for two of them to be of one kind (a threshold, the layers). If it keeps more than sums and maxima, it says in
    `_merged` how two of them become one. `METRICS` declares what `metrics` returns.
    """

    maxima: ClassVar[int] = 0
    """How many of the last entries of `as_tensor()` merge by maximum; those before merge by addition."""
    METRICS: ClassVar[tuple[Metric, ...]] = ()
    """What `metrics` returns, as docs/reference/metrics.md lists it: formulas, units, sources, charts and alarms."""

    @property
    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """What has to be equal for two sums to merge, by name."""

    @abstractmethod
    def as_tensor(self) -> torch.Tensor:
        """All totals as float64 `[T]` on the CPU."""

    @abstractmethod
    def with_totals(self, totals: torch.Tensor) -> Self:
        """Sums of the same kind with other totals, laid out as `as_tensor` does."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Flat metric names with their values; a mean over no tokens is NaN, never 0."""

    def merge(self, other: Self) -> Self:
        """The totals of both, as if their tokens had come in one call.

        Raises `DiagnosticsError` if the two are not of one kind.
        """
        if type(other) is not type(self) or other.signature != self.signature:
            raise DiagnosticsError(
                f"sums of different kinds cannot be merged: {type(self).__name__} {self.signature} and "
                f"{type(other).__name__} {getattr(other, 'signature', '')}; use the same settings on both sides"
            )
        return self._merged(other)

    def _merged(self, other: Self) -> Self:
        mine, theirs = self.as_tensor(), other.as_tensor()
        added = len(mine) - self.maxima
        return self.with_totals(torch.cat([mine[:added] + theirs[:added], torch.maximum(mine[added:], theirs[added:])]))

    def __add__(self, other: Self) -> Self:
        return self.merge(other) if isinstance(other, MergeableSums) else NotImplemented

    def __radd__(self, other: object) -> Self:
        # The builtin `sum` starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        # For subclasses that hold tensors, and so leave the comparison of dataclasses out.
        if type(other) is not type(self):
            return NotImplemented
        return self.signature == other.signature and torch.equal(self.as_tensor(), other.as_tensor())

    __hash__ = None  # type: ignore[assignment]

    def reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """The totals of all ranks of `group` (default: all), the same to the last bit on each; a collective call.

        All ranks' totals are gathered and merged in the order of the ranks. Without an initialised process group there
        is one rank, and its totals are returned as they are. Waits no longer than the group's own timeout. Raises
        `DiagnosticsError`, on every rank, if the ranks hold different kinds of sums.
        """
        if not dist.is_initialized():
            if group is not None:
                raise DiagnosticsError("reduce got a group, but torch.distributed is not initialised")
            return self
        # Ranks that disagree may hold vectors of different lengths, on which a collective hangs or mixes entries.
        if not same_on_all_ranks(_fingerprint(self), group):
            raise DiagnosticsError(
                f"ranks hold different kinds of sums; rank {dist.get_rank()} has {type(self).__name__} "
                f"{self.signature}; use the same settings, layers and slots on every rank"
            )
        mine = self.as_tensor().to(collective_device(group))
        totals = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(totals, mine, group=group)
        return reduce(type(self).merge, [self.with_totals(each.cpu()) for each in totals])


def collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor has to be for a collective of `group`: the CPU if its backend takes it there."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def same_on_all_ranks(value: float, group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks of `group` (None: all) came with the same float64; a collective call."""
    # The maxima of x and of -x are opposite only if all x are equal.
    extremes = torch.tensor([value, -value], dtype=torch.float64, device=collective_device(group))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes.tolist()
    return highest == -lowest


def _fingerprint(sums: MergeableSums) -> float:
    text = f"{type(sums).__name__} {sorted(sums.signature.items())!r}"
    # 48 bits: a float64 holds them exactly.
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
