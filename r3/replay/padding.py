"""Rows of padding in a forward: nothing is computed from them, so that any expert will do.

Routed live, all go to the same experts: they are one token, which sees little or nothing of its row. Under expert
parallelism the ranks of these experts would then do the work of the padding. So it is spread over the experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from r3.routing.positions import text_positions


def padding_rows(kwargs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """bool `[B, S]` = `shape`, true on padding, as a forward's keywords tell it; None if they do not.

    It is what an `attention_mask` `[B, S]` hides. Without one, and with `position_ids`: zeros at the end of a row, as
    packed rows have them, but the last, which may begin a sequence that goes on in another rank's slice.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == shape and not mask.is_floating_point():
        return mask == 0
    if mask is not None or not isinstance(positions, Tensor) or positions.shape[-2:] != shape:
        return None
    ends = (text_positions(positions) == 0).flip(1).cumprod(1).flip(1).bool()
    return torch.nn.functional.pad(ends[:, 1:] & ends[:, :-1], (0, 1))


def spread_ids(like: Tensor, num_experts: int) -> Tensor:
    """Ids of the shape `[T, L, K]`, dtype and device of `like`: distinct in a row, and each expert as often as others.

    Example:
        >>> spread_ids(torch.zeros(3, 1, 2, dtype=torch.int64), num_experts=4)[:, 0]
        tensor([[0, 1],
                [2, 3],
                [0, 1]])
    """
    counts = [torch.arange(n, device=like.device) for n in like.shape]
    row, layer, slot = torch.meshgrid(*counts, indexing="ij")
    return ((row * like.shape[-1] + layer + slot) % num_experts).to(like.dtype)


def choosing_rows(
    ids: Tensor, invalid: Tensor, count: int, padding: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """The rows of a forward that are routed live, and its ids with those of padding spread over the experts.

    Args:
        ids: integer `[T, L, K]`.
        invalid: bool `[T]`, rows without routing, or `[T, L]` where layers differ.
        count: number of rows that are not valid in every layer, at least 1.
        padding: bool, T elements, or None if there is none.
        num_experts: E.

    Returns:
        `ids`, changed in the rows of padding that are invalid; and int64 `[count]`, the rows that choose for
        themselves, or bool `[T, L]`. If all invalid rows are padding, one of them chooses.
    """
    if padding is None:
        return ids, torch.nonzero_static(invalid, size=count)[:, 0] if invalid.dim() == 1 else invalid
    padding = padding.to(ids.device).flatten()
    unused = invalid & (padding if invalid.dim() == 1 else padding[:, None])
    spread = spread_ids(ids, num_experts)
    ids = torch.where(unused.view(len(ids), -1, 1), spread, ids)
    if invalid.dim() == 2:
        return ids, invalid & ~unused
    # How many rows are left only the device knows, and the host does not wait for it: some are named more than once.
    found = torch.nonzero_static(invalid & ~unused, size=count)[:, 0]  # -1 behind the last
    one = torch.where(found[:1] < 0, torch.nonzero_static(invalid, size=1)[:, 0], found[:1])
    return ids, torch.where(found < 0, one, found)
