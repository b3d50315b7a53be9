"""Agreement of rows that several turns of a conversation captured for the same token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r3.capture.rollout import Rollout
from r3.capture.stitch import stitch
from r3.errors import CaptureError


@dataclass(frozen=True, kw_only=True)
class OverlapReport:
    """Comparison of rows that later turns captured again with the first capture of the same token.

    Attributes:
        rows: captured again; a token that k turns captured counts k - 1 times.
        differing_rows: of these, the ones whose experts differ in at least one layer.
        layer_ids: decoder layer of each of the L columns.
        differing_by_layer: rows that differ in each of them.
    """

    rows: int
    differing_rows: int
    layer_ids: tuple[int, ...]
    differing_by_layer: tuple[int, ...]


def compare_overlap(turns: Sequence[Rollout]) -> OverlapReport:
    """Count the rows of one conversation that a later turn captured differently; the order of slots is ignored.

    Only rows that were captured in every layer are compared.

    Raises:
        CaptureError: as `stitch`; also turns without routing.
    """
    kept = stitch(turns, overlap="earlier").routing
    if kept is None:
        raise CaptureError("the turns have no routing: there are no rows to compare")
    seen = torch.zeros_like(kept.valid[0])
    rows = differing = 0
    by_layer = torch.zeros(kept.shape[2], dtype=torch.int64)
    for turn in turns:
        assert turn.routing is not None
        valid = turn.routing.valid[0]
        again = (valid & seen[: len(valid)]).nonzero()[:, 0]
        first, later = (routing.expert_ids[0, again].sort(-1).values for routing in (kept, turn.routing))
        differs = (first != later).any(-1)
        rows += len(again)
        differing += int(differs.any(-1).sum())
        by_layer += differs.sum(0).cpu()
        seen[: len(valid)] |= valid
    return OverlapReport(
        rows=rows, differing_rows=differing, layer_ids=kept.layer_ids, differing_by_layer=tuple(by_layer.tolist())
    )
