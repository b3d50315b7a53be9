"""Single expert layers, and their results and gradients under an experts function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import r3.experts


@dataclass(frozen=True)
class Shape:
    """Tokens, experts, intermediate, hidden, slots."""

    tokens: int
    experts: int
    intermediate: int
    hidden: int
    slots: int


SHAPES = {
    "usual": Shape(50, 8, 24, 32, 3),
    "one token": Shape(1, 8, 24, 32, 2),
    "most experts without tokens": Shape(5, 300, 16, 24, 4),
    "one expert": Shape(9, 1, 16, 8, 1),
    "odd sizes": Shape(33, 7, 13, 11, 7),
}


def layer_of(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Qwen3MoeExperts:
    """Random weights, the same at every call, which are bfloat16 numbers whatever the dtype."""
    r3.experts.register()
    sizes = dict(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
        num_experts_per_tok=shape.slots,
    )  # fmt: skip
    layer = Qwen3MoeExperts(Qwen3MoeConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        weight.data = rounded(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return layer.to(device, dtype)


def inputs_of(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, ids, weights, and the result's gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden, grad = (rounded(torch.randn(shape.tokens, shape.hidden, generator=generator)) for _ in range(2))
    ids = torch.rand(shape.tokens, shape.experts, generator=generator).argsort(-1)[:, : shape.slots]
    weights = rounded(torch.rand(shape.tokens, shape.slots, generator=generator) + 0.1)
    return hidden.to(device, dtype), ids.to(device), weights.to(device, dtype), grad.to(device, dtype)


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def outcome(
    layer: Qwen3MoeExperts, implementation: str, hidden: Tensor, ids: Tensor, weights: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """The layer's result, and the gradients of inputs and parameters that require one."""
    layer.config._experts_implementation = implementation
    layer.zero_grad()
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    result = layer(hidden, ids, weights)
    result.backward(grad)
    found = {"result": result.detach(), "hidden": hidden.grad, "weights": weights.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; NaN is never small."""
    return float((found.double().cpu() - expected.cpu()).norm() / expected.norm().clamp(min=1e-30).cpu())


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: error(found[name], expected[name]) for name in expected}
