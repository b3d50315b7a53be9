"""Optimizer and gradient norm of a model whose parameters are spread over ranks in several ways.

Under expert parallelism those of the experts are sharded over other groups of ranks than the rest, and where tensor
parallelism leaves a parameter whole, it is a plain tensor beside DTensors. torch's functions over lists of parameters
take one kind only.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """The trainable parameters of `model`, as an optimizer takes them: a group for each way they are spread over ranks.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3))]
        [2]
    """
    return [{"params": group} for group in _by_placement(p for p in model.parameters() if p.requires_grad)]


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `model` down to an L2 norm of at most `max_norm`, as torch's `clip_grad_norm_` does.

    Each of its ranks calls this.

    Returns:
        Scalar, the norm of all gradients before, on each rank the same.
    """
    groups = _by_placement(p for p in model.parameters() if p.grad is not None)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def in_one_piece(state: Any, like: Any = None) -> Any:
    """`state`, nested dicts and lists, with DTensors of which each rank holds one contiguous part along a dimension.

    Where FSDP2 shards experts that expert parallelism has sharded, a rank's part lies in several places of the whole
    (`_StridedShard`). torch's distributed checkpoint (2.13) takes it for one, and saves it to the wrong place.

    Args:
        state: as `torch.distributed.checkpoint.state_dict.get_state_dict` returns it.
        like: a state of the same form whose placements the result has instead: the way back.
    """
    if isinstance(state, dict):
        return {key: in_one_piece(value, None if like is None else like[key]) for key, value in state.items()}
    if isinstance(state, list | tuple):
        rest = [None] * len(state) if like is None else like
        return type(state)(in_one_piece(value, other) for value, other in zip(state, rest, strict=True))
    if not isinstance(state, DTensor):
        return state
    wanted = tuple(Shard(p.dim) if isinstance(p, _StridedShard) else p for p in state.placements)
    wanted = wanted if like is None else like.placements
    return state if wanted == state.placements else state.redistribute(placements=wanted)


def _by_placement(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())
