"""The value of one computation with the gradient of another."""

from typing import Any

import torch
from torch import Tensor


class _EngineValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def with_value(own: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, whose gradient goes to `own`: the straight-through estimator (arXiv 1308.3432).

    Args:
        own: any shape; what the trainer computed.
        value: same shape and dtype, without a gradient; what the engine computes from the same input.
    """
    if own.shape != value.shape or own.dtype != value.dtype:
        raise ValueError(f"expected a value of {own.dtype} {tuple(own.shape)}, got {value.dtype} {tuple(value.shape)}")
    return _EngineValue.apply(own, value.detach()) if own.requires_grad else value.detach()
