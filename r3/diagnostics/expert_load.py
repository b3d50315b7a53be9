"""How evenly tokens are spread over the experts, live and in the rollout.

Shapes: L decoder layers, K slots, E experts; [...] stands for any leading dimensions, usually [B, S].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.histogram import counts_of
from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import Chart, Metric
from r3.diagnostics.routing_pair import RoutingPair
from r3.errors import DiagnosticsError

if TYPE_CHECKING:
    from typing_extensions import Self

SIDES = ("live", "rollout")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadSums(MergeableSums):
    """Mergeable counts of slots by expert: all integers, so that merging is exact in any order."""

    counts: torch.Tensor = field(repr=False)
    """int64 `[2, L, E]`, live and rollout: how many slots of the valid rows an expert got."""
    layer_ids: tuple[int, ...]

    METRICS = (
        Metric(
            name="load_entropy/{live,rollout}",
            formula="mean over layers of -sum q log q / log E",
            notes="1 if even, 0 if one expert gets all; NaN for E = 1",
        ),
        Metric(
            name="load_max/{live,rollout}",
            formula="max over layers of (largest q) · E",
            notes="1 if even, E / K at most",
            chart=Chart(
                section="load",
                title="Most loaded expert",
                unit="times the mean load",
                caption="Load of the busiest expert over the mean of its layer; the largest of all layers.",
            ),
        ),
        Metric(
            name="load_shift",
            formula="mean over layers of half the sum over experts of abs(q_live - q_rollout)",
            notes="total variation, 0 to 1; large only if routing differs to one side",
            chart=Chart(
                section="load",
                title="Load that moved",
                unit="share of the load",
                caption="How much of the load sits on other experts live than in the rollout; mean over layers.",
                label="shift",
                share=True,
                from_zero=True,
                colour="fourth",
            ),
        ),
    )

    @classmethod
    def from_tensors(
        cls,
        live: torch.Tensor,
        replayed: torch.Tensor,
        valid: torch.Tensor,
        *,
        num_experts: int,
        layer_ids: Sequence[int],
    ) -> Self:
        """Counts of one batch: `live` and `replayed`, the rollout's, are expert ids `[..., L, K]`, `valid` is bool.

        They are as for `RoutingSums`, which also looks for ids that are repeated in a row. Raises `DiagnosticsError`
        for wrong shapes or dtypes, and for ids in valid rows that are not from 0 below `num_experts`.
        """
        if num_experts < 1:
            raise DiagnosticsError(f"num_experts: expected 1 or more, got {num_experts}")
        pair = RoutingPair(live, replayed, valid, layer_ids)
        n_layers = len(pair.layers)
        counts = torch.zeros(2, n_layers * num_experts, dtype=torch.int64, device=live.device)
        layer = torch.arange(n_layers, device=live.device, dtype=torch.int32) * num_experts
        for block in pair.blocks():
            for side, (name, ids) in enumerate((("live", block.live), ("replayed", block.replayed))):
                lowest, highest = torch.stack(block.left_out(ids, 0).aminmax()).tolist()
                if lowest < 0 or highest >= num_experts:
                    raise DiagnosticsError(
                        f"{name}: expected expert ids from 0 to {num_experts - 1} in every valid row, got {lowest} to "
                        f"{highest}; mark rows that were not captured as invalid"
                    )
                bins = block.left_out(ids + layer, n_layers * num_experts)
                counts[side] += counts_of(bins, n_layers * num_experts + 1)[:-1]
        return cls(counts=counts.cpu().view(2, n_layers, num_experts), layer_ids=pair.layers)

    @property
    def signature(self) -> dict[str, Any]:
        return {"layer_ids": self.layer_ids, "num_experts": self.counts.shape[-1]}

    def as_tensor(self) -> torch.Tensor:
        """The counts, flattened, float64; all merge by addition."""
        return self.counts.flatten().double()

    def with_totals(self, totals: torch.Tensor) -> Self:
        return type(self)(counts=totals.long().view_as(self.counts), layer_ids=self.layer_ids)

    @classmethod
    def empty(cls, *, num_experts: int, layer_ids: Sequence[int]) -> Self:
        """The neutral element of `merge`: no rows."""
        layers = tuple(layer_ids)
        return cls(counts=torch.zeros(2, len(layers), num_experts, dtype=torch.int64), layer_ids=layers)

    def metrics(self) -> dict[str, float]:
        """Evenness on both sides, by the names in `METRICS`; NaN when there are no rows."""
        experts = self.counts.shape[-1]
        # No rows: 0 / 0, which is NaN and stays it.
        share = self.counts.double() / self.counts.sum(-1, keepdim=True)
        evenness = -torch.xlogy(share, share).sum(-1) / math.log(experts) if experts > 1 else share[..., 0] * math.nan
        entropy, largest = evenness.mean(-1).tolist(), (share.amax((1, 2)) * experts).tolist()
        return {
            **{f"load_entropy/{side}": value for side, value in zip(SIDES, entropy, strict=True)},
            **{f"load_max/{side}": value for side, value in zip(SIDES, largest, strict=True)},
            "load_shift": float((share[0] - share[1]).abs().sum(-1).mean() / 2),
        }

    def table(self) -> dict[str, Any]:
        """Counts as lists, for a report: `layer_ids`, and `live` and `rollout`, each `[L][E]`."""
        return {"layer_ids": list(self.layer_ids)} | dict(zip(SIDES, self.counts.tolist(), strict=True))
