"""Checks on the content of routing: expert ids in range, and distinct within a row."""

import torch
from torch import Tensor

from r3.errors import SHOWN, RoutingError, summary

_BLOCK_IDS = 1 << 24  # ids looked at in one go: bounds the extra memory


def bad_rows(ids: Tensor, num_experts: int) -> Tensor:
    """`[R, L]` bool: rows of integer `[R, L, K]` with an id outside [0, num_experts) or an id that occurs twice."""
    wide = ids if ids.dtype == torch.uint8 else ids.to(torch.int32)
    bad = (wide.amax(-1) >= num_experts) | (wide.amin(-1) < 0)
    if ids.shape[-1] > 1:
        ordered = wide.sort(dim=-1).values
        bad |= (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    return bad


def check_rows(
    expert_ids: Tensor,
    valid: Tensor,
    layer_ids: tuple[int, ...],
    num_experts: int,
    error: type[Exception] = RoutingError,
) -> None:
    """Raise unless every valid row holds K distinct ids in [0, num_experts).

    Args:
        expert_ids: integer `[B, S, L, K]`.
        valid: bool `[B, S]`; rows that are not valid are not looked at.
        layer_ids: decoder layer of each of the L columns, for the message.
        num_experts: E.
        error: class to raise.

    Raises:
        error: names sample, position and decoder layer of the first offending rows.
    """
    where = valid.reshape(-1).nonzero().squeeze(-1)
    rows = expert_ids.reshape(-1, *expert_ids.shape[2:])
    step = max(1, _BLOCK_IDS // max(1, rows[0].numel())) if len(rows) else 1
    found: list[tuple[int, int]] = []
    total = 0
    for at in range(0, len(where), step):
        block = where[at : at + step]
        hits = bad_rows(rows[block], num_experts).nonzero()
        total += len(hits)
        found += [(int(block[r]), int(c)) for r, c in hits[: SHOWN - len(found)].tolist()]
    if not total:
        return
    length = expert_ids.shape[1]
    lines = [
        f"sample {row // length}, position {row % length}, decoder layer {layer_ids[column]}: "
        f"{rows[row, column].tolist()}"
        for row, column in found
    ]
    raise error(
        f"{total} (token, layer) rows of routing are not {expert_ids.shape[-1]} distinct expert ids in "
        f"[0, {num_experts}). Rows that were not captured must be marked invalid, never filled. Found:{summary(lines)}"
    )
