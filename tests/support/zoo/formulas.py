"""How each family turns router logits and chosen experts into weights: float64, differentiable, free of any top-k.

Nearly all are `w = scale * g(logits)[ids] / (sum + eps, if renormalised)`. Correction biases and group limits are
absent on purpose: they act on the choice alone. Written from papers and sources, without use of their code.

Shapes: T tokens, H hidden size, E experts to choose from, K of them chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Score = Callable[[Tensor, Tensor], Tensor]  # (logits [T, E], ids [T, K]) -> [T, K]


def softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, ids)


def softmax_of_chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids).softmax(-1)


def sigmoid(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids).sigmoid()


def sqrt_softplus(logits: Tensor, ids: Tensor) -> Tensor:
    return F.softplus(logits.gather(-1, ids)).sqrt()


def parameter(module: nn.Module, path: str) -> Tensor:
    return module.get_parameter(path).double()


def tokens(hidden: Tensor) -> Tensor:
    """`[T, H]` in float64, from `[T, H]` or `[B, S, H]`."""
    return hidden.reshape(-1, hidden.shape[-1]).double()


@dataclass(frozen=True, kw_only=True)
class Formula:
    """One linear gate, one score, and perhaps a renormalisation.

    Args:
        norm: order of the norm that divides the scores (1: their sum), or None if they are taken as they are.
        eps: added to that norm.
        least: the norm is at least this.
        multiplier: of the logits.
        softcap: the logits are squashed smoothly to this magnitude.
        weight, bias: paths of the gate's parameters in the router.
    """

    score: Score
    norm: float | None = None
    eps: float = 0.0
    least: float = 0.0
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    weight: str = "weight"
    bias: str | None = None

    def __call__(self, router: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
        logits = self.multiplier * tokens(hidden) @ parameter(router, self.weight).T
        if self.bias is not None:
            logits = logits + parameter(router, self.bias)
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        weights = self.score(logits, ids)
        if self.norm is not None:
            total = torch.linalg.vector_norm(weights, ord=self.norm, dim=-1, keepdim=True)
            weights = weights / (total + self.eps).clamp(min=self.least)
        return self.scale * weights


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@dataclass(frozen=True, kw_only=True)
class Gemma4Formula:
    """A normalised and scaled input, probabilities renormalised over the chosen, and a scale of each expert's own."""

    eps: float = 1e-6

    def __call__(self, router: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
        x = rms_norm(tokens(hidden), self.eps) * parameter(router, "scale") * hidden.shape[-1] ** -0.5
        weights = softmax_of_chosen(x @ parameter(router, "proj.weight").T, ids)
        return weights * parameter(router, "per_expert_scale")[ids]


@dataclass(frozen=True, kw_only=True)
class InklingFormula:
    """Sigmoids of the chosen experts, renormalised together with those of the shared experts."""

    scale: float
    shared: int

    def __call__(self, router: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
        scores = (tokens(hidden) @ parameter(router, "weight").T).sigmoid()
        chosen = scores.gather(-1, ids)
        total = chosen.sum(-1, keepdim=True) + scores[:, -self.shared :].sum(-1, keepdim=True)
        return self.scale * parameter(router, "global_scale") * chosen / total


@dataclass(frozen=True, kw_only=True)
class ZayaFormula:
    """Probabilities of a small network that also sees the router of the layer before; the last class is "skip"."""

    eps: float = 1e-5

    def __call__(self, router: nn.Module, hidden: Tensor, ids: Tensor, router_states: Tensor | None = None) -> Tensor:
        def linear(x: Tensor, name: str, bias: bool = True) -> Tensor:
            y = x @ parameter(router, f"{name}.weight").T
            return y + parameter(router, f"{name}.bias") if bias else y

        x = linear(tokens(hidden), "down_proj")
        if router_states is not None:
            x = x + tokens(router_states) * parameter(router, "router_states_scale")
        x = rms_norm(x, self.eps) * parameter(router, "router_mlp.norm.weight")
        for name in ("router_mlp.fc1", "router_mlp.fc2"):
            x = F.gelu(linear(x, name))
        logits = linear(x, "router_mlp.out_proj", bias=False)
        skip = logits.shape[-1] - 1
        return softmax(logits, ids).masked_fill(ids == skip, 0.0)
