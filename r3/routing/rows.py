"""Rows as trainers carry them -> checked routing. Each trainer marks in its own way the rows that were not captured."""

import torch
from torch import Tensor

from r3.errors import RoutingError
from r3.routing.spec import RoutingSpec
from r3.routing.types import RolloutRouting


def routing_of(
    spec: RoutingSpec, expert_ids: Tensor, *, valid: Tensor | None = None, repeats_are_missing: bool = False
) -> RolloutRouting:
    """`RolloutRouting` of rows in a trainer's own layout and with its own mark for missing ones.

    Without `valid` and `repeats_are_missing`, ids of -1 mark what is missing, also in some layers of a row only. An
    unsigned tensor has no -1: all its rows are valid.

    Args:
        spec: of the model (`Replay.spec`).
        expert_ids: integer `[B, S, L, K]`, or rows without padding `[T, L, K]` or jagged, which give `[1, T, L, K]`. L
            counts the layers that have a router, or all decoder layers, of which the others are dropped.
        valid: bool `[B, S]`, or `[T]`: False where ids are a filling, whatever they are.
        repeats_are_missing: a row whose ids repeat in every layer (all zeros, as trainers pad) was not captured. One in
            which they repeat in some layers only is damaged.

    Raises:
        RoutingError: another shape or dtype; an id out of range or repeated in a row that is not missing; one slot a
            layer, where no id can repeat; `valid` and `repeats_are_missing` together.

    Example:
        >>> spec = RoutingSpec(layer_ids=(0,), num_layers=1, num_experts=8, top_k=2)
        >>> rows = torch.tensor([[[3, 5]], [[0, 0]]], dtype=torch.uint8)  # [T, L, K]
        >>> routing_of(spec, rows, repeats_are_missing=True).valid
        tensor([[ True, False]])
    """
    if expert_ids.is_nested:
        expert_ids = expert_ids.values()
    packed = expert_ids.dim() == 3
    rows = spec.columns(expert_ids[None] if packed else expert_ids)
    if valid is not None:
        if repeats_are_missing:
            raise RoutingError("expected valid or repeats_are_missing, got both: only one can say what is missing")
        valid = valid.values() if valid.is_nested else valid
        captured = valid[None] if packed and valid.dim() == 1 else valid
    elif repeats_are_missing:
        captured = ~_repeats(rows, spec)
    elif rows.dtype.is_signed:  # torch would compare 255 in uint8, an expert's id, as equal to -1
        captured = ~(rows == -1).all(-1)
    else:
        captured = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return RolloutRouting(rows, captured, spec.layer_ids, spec.num_experts)


def _repeats(rows: Tensor, spec: RoutingSpec) -> Tensor:
    """bool `[B, S]`: rows of `[B, S, L, K]` in which every layer repeats an id."""
    if spec.top_k == 1:
        raise RoutingError(
            "repeats_are_missing: expected two slots a layer or more, got top_k = 1, with which a row of expert 0 "
            "cannot be told from a filling of zeros. Give `valid`"
        )
    ordered = rows.sort(-1).values
    return (ordered[..., 1:] == ordered[..., :-1]).any(-1).all(-1)
