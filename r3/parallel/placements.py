"""Optimizer and gradient norm of a model whose parameters are spread over ranks in several ways.

Under expert parallelism those of the experts are sharded over other groups of ranks than the rest, and where tensor
parallelism leaves a parameter whole, it is a plain tensor beside DTensors. torch's functions over lists of parameters
take one kind only.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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


def _by_placement(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())
