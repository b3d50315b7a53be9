"""How close the live choice of experts was where it differs from the rollout's, and where it agrees.

Shapes: L decoder layers, K slots; [...] stands for any leading dimensions, usually [B, S].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.histogram import BINS, bin_of, counts_of, quantile
from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import Metric
from r3.diagnostics.routing_pair import RoutingPair, common
from r3.errors import DiagnosticsError

if TYPE_CHECKING:
    from typing_extensions import Self

SIDES = ("agreeing", "differing")
QUANTILES = {"p10": 100, "p50": 500, "p90": 900}
"""In thousandths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MarginSums(MergeableSums):
    """Mergeable counts of margins, in bins; integers, so that merging is exact in any order."""

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64), repr=False)
    """int64 `[2, BINS]`: (row, layer) pairs whose sets agree, and differ, with their margin in each bin."""

    METRICS = (
        Metric(
            name="margin/agreeing_{p10,p50,p90}",
            formula="[quantiles](#quantiles) of the margin over the pairs with A = B",
            unit="of the router's scores",
        ),
        Metric(
            name="margin/differing_{p10,p50,p90}",
            formula="the same over those with A ≠ B",
            unit="of the router's scores",
        ),
    )

    @classmethod
    def from_tensors(
        cls, margins: torch.Tensor, live: torch.Tensor, replayed: torch.Tensor, valid: torch.Tensor
    ) -> Self:
        """Counts of one batch.

        Args:
            margins: floating `[..., L]` from 0 up, `Recorder.margins` of the forward that chose `live`: the score of
                the K-th best expert less that of the next, infinite where there is none.
            live, replayed, valid: as for `RoutingSums`, which also looks for ids that are repeated in a row.

        Raises:
            DiagnosticsError: wrong shapes or dtypes; NaN or negative margins in valid rows.
        """
        if margins.shape != live.shape[:-1] or not margins.dtype.is_floating_point or margins.device != live.device:
            raise DiagnosticsError(
                f"margins: expected floating [..., L] = {list(live.shape[:-1])} on {live.device}, got {margins.dtype} "
                f"{list(margins.shape)} on {margins.device}"
            )
        pair = RoutingPair(live, replayed, valid)
        rows = margins.detach().reshape(-1, len(pair.layers))
        counts = torch.zeros(2 * BINS, dtype=torch.int64, device=live.device)
        bad = torch.zeros((), dtype=torch.int64, device=live.device)
        for block in pair.blocks():
            values = rows.index_select(0, block.where).double()
            bad += block.left_out(~(values >= 0), False).sum()
            differs = common(block) < pair.slots
            counts += counts_of(block.left_out(bin_of(values) + BINS * differs, 2 * BINS), 2 * BINS + 1)[:-1]
        n_bad, *found = torch.cat([bad[None], counts]).tolist()
        if n_bad:
            raise DiagnosticsError(
                f"margins: expected 0 or more in every valid row, got {n_bad} negative or NaN of "
                f"{len(pair.where) * len(pair.layers)}; find where the router's scores became NaN"
            )
        return cls(counts=torch.tensor(found).view(2, BINS))

    @property
    def signature(self) -> dict[str, Any]:
        return {}

    def as_tensor(self) -> torch.Tensor:
        """The counts, flattened, float64; all merge by addition."""
        return self.counts.flatten().double()

    def with_totals(self, totals: torch.Tensor) -> Self:
        return type(self)(counts=totals.long().view(2, BINS))

    @classmethod
    def empty(cls) -> Self:
        """The neutral element of `merge`: no rows."""
        return cls()

    def metrics(self) -> dict[str, float]:
        """By the names in `METRICS`; up to 3.2% off, and NaN where there are no pairs."""
        return {
            f"margin/{side}_{name}": quantile(counts, per_mille)
            for side, counts in zip(SIDES, self.counts, strict=True)
            for name, per_mille in QUANTILES.items()
        }
