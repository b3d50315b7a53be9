"""How often two routings of the same tokens choose different experts, by layer.

Shapes: L decoder layers, K slots; [...] stands for any leading dimensions, usually [B, S].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.histogram import counts_of
from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import Metric
from r3.diagnostics.routing_pair import RoutingPair, common, impossible

if TYPE_CHECKING:
    from typing_extensions import Self


def compare_routing(
    live: torch.Tensor, replayed: torch.Tensor, valid: torch.Tensor, layer_ids: Sequence[int] | None = None
) -> dict[str, float]:
    """Share of tokens and layers where two routings choose different sets of experts; the order of slots is ignored.

    `live` and `replayed` are expert ids `[..., L, K]`, uint8, int16, int32 or int64, not necessarily the same; `valid`
    is bool `[...]`, or `[..., L]` where rows lack some layers, and only what is valid counts. `layer_ids` are the L
    decoder-layer numbers (default 0 to L - 1). See `RoutingSums.METRICS` for the names, and `RoutingSums` to merge
    micro-batches and ranks.

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
    order_differs: int
    """(token, layer) pairs with the same set of experts in another order of slots."""
    shared: tuple[tuple[int, ...], ...]
    """`[L][K + 1]`: how many rows of a layer share 0, 1, ..., K experts."""
    layer_ids: tuple[int, ...]

    METRICS = (
        Metric(name="rows", formula="N", unit="tokens"),
        Metric(name="differing_rows", formula="share of the pairs with A ≠ B"),
        Metric(name="differing_rows/layer_NN", formula="the same in decoder layer NN, at least two digits"),
        Metric(name="differing_tokens", formula="share of the N tokens with A ≠ B in at least one layer"),
        Metric(name="jaccard", formula="mean over the pairs of size(A ∩ B) / size(A ∪ B)"),  # noqa: RUF001
        Metric(name="order_differs", formula="share of the pairs with A = B whose slots are in another order"),
    )

    @classmethod
    def from_tensors(
        cls,
        live: torch.Tensor,
        replayed: torch.Tensor,
        valid: torch.Tensor,
        layer_ids: Sequence[int] | None = None,
    ) -> Self:
        """Counts of one batch; arguments and errors as in `compare_routing`. Waits for the device twice."""
        pair = RoutingPair(live, replayed, valid, layer_ids)
        n_layers, slots = len(pair.layers), pair.slots
        shared = torch.zeros(n_layers * (slots + 1), dtype=torch.int64, device=live.device)
        bad, differing, reordered = torch.zeros(3, dtype=torch.int64, device=live.device)
        layer = torch.arange(n_layers, device=live.device, dtype=torch.int32) * (slots + 1)
        for block in pair.blocks():
            bad += impossible(block)
            found = common(block)
            # What is missing goes beyond the last bin, and then counts as the same.
            shared += counts_of(block.left_out(found + layer, len(shared)), len(shared) + 1)[:-1]
            same = block.left_out(found == slots, True)
            differing += (~same).any(-1).sum()
            in_order = (block.live == block.replayed).view(torch.uint8).sum(0, dtype=torch.uint8) == slots
            reordered += (same & ~block.left_out(in_order, True)).sum()
        n_bad, n_differing, n_reordered, *counts = torch.cat(
            [torch.stack([bad, differing, reordered]), shared]
        ).tolist()
        if n_bad:
            pair.require_distinct()
        return cls(
            rows=len(pair.where),
            differing_tokens=n_differing,
            order_differs=n_reordered,
            shared=_by_layer(counts, slots),
            layer_ids=pair.layers,
        )

    @property
    def signature(self) -> dict[str, Any]:
        return {"layer_ids": self.layer_ids, "slots": len(self.shared[0]) - 1}

    def as_tensor(self) -> torch.Tensor:
        """`[rows, differing_tokens, order_differs, shared[0][0], ..., shared[L-1][K]]`, float64; all are added."""
        counts = [
            self.rows,
            self.differing_tokens,
            self.order_differs,
            *(count for layer in self.shared for count in layer),
        ]
        return torch.tensor(counts, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, totals: torch.Tensor, *, layer_ids: Sequence[int], slots: int) -> Self:
        """The inverse of `as_tensor`; the layers and K are not among the totals."""
        rows, differing, reordered, *counts = (int(count) for count in totals.tolist())
        return cls(
            rows=rows,
            differing_tokens=differing,
            order_differs=reordered,
            shared=_by_layer(counts, slots),
            layer_ids=tuple(layer_ids),
        )

    def with_totals(self, totals: torch.Tensor) -> Self:
        return self.from_tensor(totals, layer_ids=self.layer_ids, slots=len(self.shared[0]) - 1)

    @classmethod
    def empty(cls, *, layer_ids: Sequence[int], slots: int) -> Self:
        """The neutral element of `merge`: no rows."""
        shared = ((0,) * (slots + 1),) * len(layer_ids)
        return cls(rows=0, differing_tokens=0, order_differs=0, shared=shared, layer_ids=tuple(layer_ids))

    def metrics(self) -> dict[str, float]:
        """Disagreement between the two routings, by the names in `METRICS`; all but `rows` are NaN without rows."""
        n, slots = self.rows, len(self.shared[0]) - 1
        counts = [sum(layer) for layer in self.shared]
        pairs = sum(counts)
        differing = [count - layer[slots] for count, layer in zip(counts, self.shared, strict=True)]
        union = [2 * slots - common for common in range(slots + 1)]
        overlap = math.fsum(
            count * common / union[common] for layer in self.shared for common, count in enumerate(layer)
        )
        return {
            "rows": float(n),
            "differing_rows": _share(sum(differing), pairs),
            "differing_tokens": _share(self.differing_tokens, n),
            "jaccard": _share(overlap, pairs),
            "order_differs": _share(self.order_differs, pairs),
        } | {
            f"differing_rows/layer_{i:02d}": _share(d, count)
            for i, d, count in zip(self.layer_ids, differing, counts, strict=True)
        }


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _by_layer(counts: list[int], slots: int) -> tuple[tuple[int, ...], ...]:
    width = slots + 1
    return tuple(tuple(counts[at : at + width]) for at in range(0, len(counts), width))
