"""Differentiable exchanges of a Ulysses group: heads for sequence and back, and a sequence gathered.

Shapes: B batch, S positions of one rank, P ranks of the group, H heads of all ranks, h = H / P, D head dimension.

Gradients are those of the sum of all ranks' losses: each backward is the exact adjoint of its forward. Jacobs et al.
2023 (DeepSpeed Ulysses), arXiv 2309.14509.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def heads_for_sequence(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each `[B, H, S, D]`, all heads of this rank's positions, -> `[B, h, P * S, D]`, this rank's heads of all
    positions. H and D may differ from tensor to tensor; all travel in one exchange."""
    size = group.size()
    parts = [t.unflatten(1, (size, -1)).permute(1, 0, 3, 2, 4).flatten(3) for t in tensors]  # [P, B, S, h * D]
    received = _exchange(torch.cat(parts, dim=-1), group)
    exchanged = received.split([part.shape[-1] for part in parts], dim=-1)
    return [
        # [P, B, S, h, D] -> [B, h, P, S, D]
        part.unflatten(3, (-1, t.shape[-1])).permute(1, 3, 0, 2, 4).flatten(2, 3)
        for part, t in zip(exchanged, tensors, strict=True)
    ]


def sequence_for_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[B, P * S, h, D]`, this rank's heads of all positions, -> `[B, S, H, D]`, all heads of this rank's positions."""
    chunks = tensor.unflatten(1, (group.size(), -1)).transpose(0, 1)  # [P, B, S, h, D]
    return _exchange(chunks, group).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[B, S, ...]` of each rank -> `[B, P * S, ...]` on each of them.

    Differentiable: the gradient is summed over all ranks' losses. If every rank computes the same loss of the whole
    sequence, each must scale it by 1 / P.
    """
    if group.size() == 1:
        return tensor
    return _Gather.apply(tensor, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_to_all_single_autograd(tensor.contiguous(), None, None, group)
