"""Proof at attach: a router is replayed only after a copy of it has shown, on random input, that this is exact."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import UnsupportedModelError
from r3.replay.substitution import TopKRecorder, TopKSubstitution

_TOKENS = 64


def _random_copy(router: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of `router` on the CPU with random weights, without hooks; the original may be sharded or on meta."""

    def fresh(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        values = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values

    memo: dict[int, Any] = {id(t): fresh(t) for t in (*router.parameters(), *router.buffers())}
    # Hooks are shared, not copied: they may hold on to the whole model.
    for module in router.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value is not None:
                memo[id(value)] = type(value)()
    return copy.deepcopy(router, memo).train(router.training)


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, Tensor)]


def _foreign_ids(num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    return torch.rand(_TOKENS, num_experts, generator=generator).argsort(-1)[:, :top_k]


@torch.inference_mode(False)
@torch.enable_grad()
def prove(router: nn.Module, name: str) -> tuple[int, int]:
    """Show that top-k substitution replays `router` exactly; returns its (num_experts, top_k).

    Under its own live ids all outputs are bit-identical to live. Under foreign ids, the ids come back as given, every
    weight is non-zero, and the gradient of the weights reaches each parameter that it reaches live.

    Raises:
        UnsupportedModelError: what failed, for which router class.
    """

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name} ({type(router).__name__}) cannot be replayed exactly: {reason}")

    generator = torch.Generator().manual_seed(0)
    gate = next((p for p in router.parameters() if p.dim() == 2), None)
    if gate is None:
        raise refuse("it has no 2-D weight [E, H]")
    router = _random_copy(router, generator)
    hidden = torch.randn(_TOKENS, gate.shape[-1], generator=generator).to(gate.dtype)

    with TopKRecorder() as recorder:
        live = _tensors(router(hidden))
    choices = [
        (e, k, ids)
        for e, k, ids in recorder.calls
        if any(t.shape == ids.shape and not t.is_floating_point() and torch.equal(t, ids) for t in live)
    ]
    if len(choices) != 1:
        raise refuse(f"expected one 2-D top-k whose indices it returns, saw {len(choices)} (of {len(recorder.calls)})")
    ((num_experts, top_k, own),) = choices

    with TopKSubstitution(own, None, num_experts) as mode:
        replayed = _tensors(router(hidden))
    if mode.count != 1:
        raise refuse(f"expected one top-k of {top_k} among {num_experts}, saw {mode.count}")
    if not all(torch.equal(a, b) for a, b in zip(live, replayed, strict=True)):
        raise refuse("under its own ids its outputs differ from live")

    foreign = _foreign_ids(num_experts, top_k, generator)
    with TopKSubstitution(foreign, None, num_experts):
        other = _tensors(router(hidden))
    if not any(t.shape == foreign.shape and torch.equal(t, foreign) for t in other):
        raise refuse("it does not return the ids that it was given")
    weights = [
        t
        for t, before in zip(other, live, strict=True)
        if t.is_floating_point() and not (t.shape == before.shape and torch.equal(t, before))
    ]
    if not weights or any(not bool((w[w.isfinite()] != 0).any()) for w in weights):
        raise refuse("under foreign ids its weights do not follow the ids")
    if any(w.shape == foreign.shape and bool((w == 0).any()) for w in weights):
        raise refuse("under foreign ids some weights are zero: they come from scores cut to the live top-k")
    # A random direction, because weights that are renormalised have a constant sum.
    directions = [torch.randn(w.shape, generator=generator).to(w.dtype) for w in weights]
    copied = next(p for p in router.parameters() if p.dim() == 2)
    (gradient,) = torch.autograd.grad(weights, [copied], directions, allow_unused=True, materialize_grads=True)
    if not bool(gradient.isfinite().all()) or not bool((gradient != 0).any()):
        raise refuse("under foreign ids no gradient reaches the gate")
    return num_experts, top_k
