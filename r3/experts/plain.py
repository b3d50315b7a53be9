"""What stands between the products, in plain torch: the reference of `kernels`, and what runs where Triton does not.

Sums are taken in float32, of float64 in float64.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from r3.experts.order import Order


def spread(tokens: Tensor, order: Order) -> Tensor:
    """`[T, H]` -> `[S, H]`: each token's row once a slot, sorted by expert."""
    return tokens.index_select(0, order.slots // order.places.shape[1])


def combine(rows: Tensor, order: Order, weights: Tensor | None = None) -> Tensor:
    """`[S, H]` -> `[T, H]`: the sum of a token's rows, times `weights` `[T, K]`, slot 0 first; rounded once.

    Rows of no expert count as 0, whatever is in them.
    """
    total = torch.zeros(len(order.places), rows.shape[1], dtype=_wide(rows), device=rows.device)
    for slot, places in enumerate(order.places.unbind(1)):
        part = rows.index_select(0, places).to(total.dtype)
        if weights is not None:
            part = part * weights[:, slot, None].to(total.dtype)
        total += part.masked_fill((places >= order.ends[-1])[:, None], 0)
    return total.to(rows.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """`[S, 2 I]` -> `[S, I]`: silu of the first half, rounded, times the second half, as transformers and vLLM do."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu_backward(gate_up: Tensor, grad: Tensor, weights: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `swiglu` whose result is weighted later on.

    With a = swiglu(gate_up) and a token's result sum_k w_k (a_k down), a weight's gradient is <grad result, a down> =
    <grad result down', a>: over I numbers instead of H, and without the down product's result.

    Args:
        gate_up: `[S, 2 I]`.
        grad: `[S, I]`, of the result, times down': not weighted.
        weights: `[T, K]`.
        order: of the pairs.

    Returns:
        Gradient of `gate_up`; a times its weight, for the gradient of down; gradient of `weights`.
    """
    dtype = _wide(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    grad, weight = grad.to(dtype), weights.reshape(-1)[order.slots, None].to(dtype)
    sigmoid = gate.sigmoid()
    active = gate * sigmoid
    weighted = weight * grad
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    grad_gate_up = torch.cat([weighted * up * slope, weighted * active], dim=-1)
    product = active * up
    dots = (grad * product).sum(-1)
    # A view of the order of pairs, not of rows.
    grad_weights = dots.masked_fill(_no_expert(order), 0)[order.places.reshape(-1)].view(weights.shape)
    return grad_gate_up.to(gate_up.dtype), (weight * product).to(gate_up.dtype), grad_weights.to(weights.dtype)


def _no_expert(order: Order) -> Tensor:
    return torch.arange(len(order.slots), device=order.slots.device) >= order.ends[-1]


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
