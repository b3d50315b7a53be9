"""The expert layer as one autograd function: two grouped products, and one kernel for what stands between two steps.

    order pairs by expert -> spread -> up product -> SwiGLU -> down product -> combine, weighted

Every sum has one order: a product's own, over slots from 0, over an expert's tokens from the first. Nothing is added
atomically.
"""

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from r3.errors import UnsupportedModelError
from r3.experts import plain
from r3.experts.fit import unfit
from r3.experts.order import Order, order_by_expert
from r3.experts.products import grouped, grouped_outer

NAME = "r3_grouped"
_TRITON = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable  # a compiled layer breaks its graph here
def grouped_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts function as transformers' registry takes it.

    Args:
        experts: the layer, with `gate_up_proj` `[E, 2 I, H]` and `down_proj` `[E, H, I]`.
        hidden_states: `[T, H]`.
        top_k_index: integer `[T, K]`. Ids from E on, experts of other ranks, add nothing.
        top_k_weights: `[T, K]`, any floating dtype.

    Returns:
        `[T, H]` in the dtype of `hidden_states`. Differentiable once, in both inputs and both weights.

    Raises:
        UnsupportedModelError: the layer computes something else, such as biases or another activation.
    """
    if reason := unfit(experts):
        raise UnsupportedModelError(f"{type(experts).__name__}: experts_implementation={NAME} cannot compute {reason}")
    gate_up, down = cast(Tensor, experts.gate_up_proj), cast(Tensor, experts.down_proj)
    order = order_by_expert(top_k_index, len(gate_up))
    hidden = hidden_states.to(gate_up.dtype).contiguous()  # under autocast they differ
    weights = top_k_weights.contiguous()
    anchor, rows = _Saved.apply(hidden, weights, gate_up, down, order)
    return _Result.apply(anchor, rows, weights.detach(), down.detach(), order).to(hidden_states.dtype)


def _steps(tensor: Tensor) -> ModuleType:
    if not (tensor.is_cuda and tensor.dtype in _TRITON):
        return plain
    from r3.experts import kernels

    return kernels


class _Saved(torch.autograd.Function):
    """The first half of the layer, which keeps what the backward of both needs.

    Activation checkpointing stops to compute anew when it has all that was kept. As this half keeps it, that is before
    the down product.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order
    ) -> tuple[Tensor, Tensor]:
        rows = grouped(_steps(hidden).spread(hidden, order), gate_up.transpose(1, 2), order.ends)
        ctx.save_for_backward(hidden, weights, gate_up, down, *order, rows)
        ctx.mark_non_differentiable(rows)
        return hidden.new_zeros(()).expand_as(hidden), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        hidden, weights, gate_up, down, *order, rows = ctx.saved_tensors
        order, steps = Order(*order), _steps(hidden)
        grad_hidden = grad_gate_up = grad_down = None
        spread = steps.spread(grads[0].contiguous(), order)
        grad_rows, weighted, grad_weights = steps.swiglu_backward(
            rows, grouped(spread, down, order.ends), weights, order
        )
        if ctx.needs_input_grad[3]:
            grad_down = grouped_outer(spread, weighted, order.ends)
        del spread, weighted
        if ctx.needs_input_grad[2]:
            # Spread once more rather than kept: S x H numbers are the most that a layer has.
            grad_gate_up = grouped_outer(grad_rows, steps.spread(hidden, order), order.ends)
        if ctx.needs_input_grad[0]:
            grad_hidden = steps.combine(grouped(grad_rows, gate_up, order.ends), order)
        return grad_hidden, grad_weights if ctx.needs_input_grad[1] else None, grad_gate_up, grad_down, None


class _Result(torch.autograd.Function):
    """The second half: hands its gradient, that of the layer's result, to the first as that of `anchor`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, weights: Tensor, down: Tensor, order: Order) -> Tensor:
        steps = _steps(rows)
        return steps.combine(grouped(steps.swiglu(rows), down.transpose(1, 2), order.ends), order, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None
