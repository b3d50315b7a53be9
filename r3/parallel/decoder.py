"""Whole rows around a decoder that gets one rank's slice of them.

The tokens of an image may be in several slices, and a model inserts either all of an image's features or none. So with
images each rank embeds whole rows, with all their images, and the decoder's inputs are sliced.

Shapes: B batch, W positions of the whole rows, S positions of one rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from r3.errors import ParallelError
from r3.routing import shard
from r3.routing.positions import is_type_ids

_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_MASK = "attention_mask"
_VISUAL_MASK = "visual_pos_masks"  # bool [B, W], where deepstack's lists of features belong


def widen(args: tuple, kwargs: dict, gather: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    """Gather a model's arguments from this rank's slice to whole rows. Arguments that are not by token stay unchanged.

    Args:
        gather: `[B, S, ...]` -> `[B, W, ...]`.
    """
    changes = {}
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor) and (name in _BY_TOKEN or is_type_ids(name)):
            changes[name] = gather_positions(argument, gather) if name == "position_ids" else gather(argument)
    if args and isinstance(args[0], Tensor):  # the tokens
        args = (gather(args[0]), *args[1:])
    return args, kwargs | changes


def gather_positions(position_ids: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """`[B, S]` or `[parts, B, S]` -> the same of the whole rows."""
    if position_ids.dim() == 2:
        return gather(position_ids)
    return gather(position_ids.movedim(0, -1).contiguous()).movedim(-1, 0)


def narrow(kwargs: Mapping[str, Any], shape: tuple[int, int], rank: int, size: int) -> dict[str, Any]:
    """Slice a decoder's keyword arguments from whole rows, `shape` = (B, W), to this rank's part.

    Raises:
        ParallelError: a tensor that is not by token, and so cannot be sliced.
    """
    changes: dict[str, Any] = {}
    unknown = []
    for name, argument in kwargs.items():
        if name == _MASK and not (isinstance(argument, Tensor) and argument.dim() == 2):
            continue  # made from the gathered positions, for whole rows
        if isinstance(argument, Tensor) and argument.dim():
            dim = argument.dim() - 1 if name == "position_ids" else 1
            if argument.dim() > dim and argument.shape[dim] == shape[1] and argument.shape[dim - 1] in (1, shape[0]):
                changes[name] = shard(argument, rank, size, dim=dim)
            else:
                unknown.append(f"{name} {tuple(argument.shape)}")
        elif isinstance(argument, list | tuple) and any(isinstance(part, Tensor) for part in argument):
            visual = kwargs.get(_VISUAL_MASK)
            if visual is None or any(len(part) != int(visual.sum()) for part in argument):
                unknown.append(name)
            else:
                mine = torch.zeros_like(visual)
                shard(mine, rank, size).fill_(True)
                changes[name] = type(argument)(part[mine[visual]] for part in argument)
    if unknown:
        raise ParallelError(
            "the decoder gets tensors beside the images whose split over positions is not known: " + ", ".join(unknown)
        )
    return changes
