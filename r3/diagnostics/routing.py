"""How often two routings of the same tokens choose different experts, by layer.

Shapes: L decoder layers, K slots; [...] stands for any leading dimensions, usually [B, S].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.merging import MergeableSums
from r3.errors import SHOWN, DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
BLOCK_ELEMENTS = 1 << 22
"""Comparisons made at once: bounds the memory to a few tens of MB, whatever the batch and the number of experts."""


def compare_routing(
    live: torch.Tensor, replayed: torch.Tensor, valid: torch.Tensor, layer_ids: Sequence[int] | None = None
) -> dict[str, float]:
    """Share of tokens and layers where two routings choose different sets of experts; the order of slots is ignored.

    `live` and `replayed` are expert ids `[..., L, K]`, uint8, int16, int32 or int64, not necessarily the same; `valid`
    is bool `[...]`, and only rows where it is true count. `layer_ids` are the L decoder-layer numbers (default 0 to
    L - 1). See `RoutingSums.metrics` for the names, and `RoutingSums` to merge micro-batches and ranks.

    Raises `DiagnosticsError` for unequal shapes, other dtypes, and valid rows with negative or repeated ids.

    >>> ids = torch.tensor([[[0, 1], [2, 3]]])
    >>> compare_routing(ids, torch.tensor([[[1, 0], [2, 4]]]), torch.tensor([True]))["differing_rows"]
    0.5
    """
    return RoutingSums.from_tensors(live, replayed, valid, layer_ids).metrics()


@dataclass(frozen=True, kw_only=True)
class RoutingSums(MergeableSums):
    """Mergeable counts behind `compare_routing`: all integers, so that merging is exact in any order."""

    rows: int
    differing_tokens: int
    shared: tuple[tuple[int, ...], ...]
    """`[L][K + 1]`: how many rows of a layer share 0, 1, ..., K experts."""
    layer_ids: tuple[int, ...]

    @classmethod
    def from_tensors(
        cls,
        live: torch.Tensor,
        replayed: torch.Tensor,
        valid: torch.Tensor,
        layer_ids: Sequence[int] | None = None,
    ) -> Self:
        """Counts of one batch; arguments and errors as in `compare_routing`."""
        _check(live, replayed, valid)
        n_layers, slots = live.shape[-2:]
        layers = tuple(range(n_layers)) if layer_ids is None else tuple(index(i) for i in layer_ids)
        if len(layers) != n_layers or len(set(layers)) != n_layers or min(layers) < 0:
            raise DiagnosticsError(f"layer_ids: expected {n_layers} distinct layer numbers from 0 up, got {layers}")
        if not valid.dim():
            live, replayed, valid = live[None], replayed[None], valid[None]
        where = valid.nonzero()
        shared = torch.zeros(n_layers, slots + 1, dtype=torch.int64, device=live.device)
        differing = torch.zeros((), dtype=torch.int64, device=live.device)
        layer = torch.arange(n_layers, device=live.device) * (slots + 1)
        step = max(1, BLOCK_ELEMENTS // (n_layers * slots * slots))
        for block in where.split(step):
            at = tuple(block.unbind(-1))
            a, b = live[at], replayed[at]
            _check_ids("live", a, block, layers)
            _check_ids("replayed", b, block, layers)
            # Ids are distinct within a row, so the number of equal pairs is the size of the intersection.
            common = (a.unsqueeze(-1) == b.unsqueeze(-2)).flatten(-2).sum(-1)
            shared += (common + layer).flatten().bincount(minlength=shared.numel()).view_as(shared)
            differing += (common < slots).any(-1).sum()
        return cls(
            rows=len(where),
            differing_tokens=int(differing),
            shared=tuple(tuple(counts) for counts in shared.tolist()),
            layer_ids=layers,
        )

    @property
    def signature(self) -> dict[str, Any]:
        return {"layer_ids": self.layer_ids, "slots": len(self.shared[0]) - 1}

    def as_tensor(self) -> torch.Tensor:
        """`[rows, differing_tokens, shared[0][0], ..., shared[L-1][K]]`, float64; all merge by addition."""
        counts = [self.rows, self.differing_tokens, *(count for layer in self.shared for count in layer)]
        return torch.tensor(counts, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, totals: torch.Tensor, *, layer_ids: Sequence[int], slots: int) -> Self:
        """The inverse of `as_tensor`; the layers and K are not among the totals."""
        rows, differing, *counts = (int(count) for count in totals.tolist())
        width = slots + 1
        shared = tuple(tuple(counts[i * width : (i + 1) * width]) for i in range(len(layer_ids)))
        return cls(rows=rows, differing_tokens=differing, shared=shared, layer_ids=tuple(layer_ids))

    def with_totals(self, totals: torch.Tensor) -> Self:
        return self.from_tensor(totals, layer_ids=self.layer_ids, slots=len(self.shared[0]) - 1)

    @classmethod
    def empty(cls, *, layer_ids: Sequence[int], slots: int) -> Self:
        """The neutral element of `merge`: no rows."""
        shared = ((0,) * (slots + 1),) * len(layer_ids)
        return cls(rows=0, differing_tokens=0, shared=shared, layer_ids=tuple(layer_ids))

    def metrics(self) -> dict[str, float]:
        """Disagreement between the two routings; all but `rows` are NaN when there are no rows.

        `rows`                     valid rows, that is, tokens
        `differing_rows`           share of (token, layer) pairs whose sets of experts differ
        `differing_rows/layer_NN`  the same for decoder layer NN (two digits or more)
        `differing_tokens`         share of tokens that differ in at least one layer
        `jaccard`                  mean over (token, layer) pairs of |A and B| / |A or B|
        """
        n, n_layers, slots = self.rows, len(self.layer_ids), len(self.shared[0]) - 1
        differing = [n - layer[slots] for layer in self.shared]
        union = [2 * slots - common for common in range(slots + 1)]
        overlap = math.fsum(
            count * common / union[common] for layer in self.shared for common, count in enumerate(layer)
        )
        return {
            "rows": float(n),
            "differing_rows": _share(sum(differing), n * n_layers),
            "differing_tokens": _share(self.differing_tokens, n),
            "jaccard": _share(overlap, n * n_layers),
        } | {f"differing_rows/layer_{i:02d}": _share(d, n) for i, d in zip(self.layer_ids, differing, strict=True)}


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _check(live: torch.Tensor, replayed: torch.Tensor, valid: torch.Tensor) -> None:
    problems = []
    if live.shape != replayed.shape or live.dim() < 2 or live.shape[:-2] != valid.shape:
        shapes = f"live {list(live.shape)}, replayed {list(replayed.shape)}, valid {list(valid.shape)}"
        problems.append(f"shapes: expected [..., L, K] twice and valid [...], got {shapes}")
    elif 0 in live.shape[-2:]:
        problems.append(f"shapes: expected at least one layer and one slot, got [..., L, K] = {list(live.shape)}")
    if not live.device == replayed.device == valid.device:
        problems.append(f"devices: expected one, got {live.device}, {replayed.device}, {valid.device}; move them first")
    for name, tensor in (("live", live), ("replayed", replayed)):
        if tensor.dtype not in DTYPES:
            problems.append(f"{name}: expected expert ids of dtype uint8, int16, int32 or int64, got {tensor.dtype}")
    if valid.dtype != torch.bool:
        problems.append(f"valid: expected torch.bool, got {valid.dtype}; use valid.bool()")
    if problems:
        raise DiagnosticsError(f"routings cannot be compared:{summary(problems)}")


def _check_ids(name: str, ids: torch.Tensor, where: torch.Tensor, layers: tuple[int, ...]) -> None:
    ordered = ids.sort(-1).values
    bad = (ordered[..., 0] < 0) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if bad.any():
        rows = bad.nonzero()[:SHOWN].tolist()
        shown = [f"at {tuple(where[n].tolist())}, layer {layers[i]}: {ids[n, i].tolist()}" for n, i in rows]
        raise DiagnosticsError(
            f"{name}: expected distinct expert ids from 0 up in every valid row, got negative or repeated ones; "
            f"mark rows that were not captured as invalid. First found:{summary(shown)}"
        )
