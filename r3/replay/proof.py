"""Proof at attach: a router is replayed only after a copy of it has shown, on random input, that this is exact.

Shapes: T tokens, E experts, K slots, H hidden.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import UnsupportedModelError, summary
from r3.own_methods import code_of, on_copy, set_aside
from r3.replay.discovery import ROUTE, RouterSite
from r3.replay.families import family_of
from r3.replay.topk import Choice, TopKRecorder, TopKSubstitution
from r3.wrappers import original_class, unwrapped

_TOKENS = 64
_FSDP_STATE = "__composable_api"  # what `fully_shard` keeps in a module's attributes


class _NotReplayable(Exception):
    """The reason why a router fails the proof."""


def _fresh(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random CPU tensor of the shape and dtype of `tensor`, which may be sharded or on meta."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() > 1:  # scores far from saturation, whatever H
        values *= tensor.shape[-1] ** -0.5
    return nn.Parameter(values.to(tensor.dtype)) if isinstance(tensor, nn.Parameter) else values.to(tensor.dtype)


def _code(module: nn.Module, method: str) -> Callable:
    code = code_of(module, method)
    if code is None:
        raise _NotReplayable(
            f"`{method}` was put on this {type(module).__name__} itself, is not bound to it and wraps nothing that is, "
            "so that no copy can run it: bind it with types.MethodType"
        )
    return code


def _unsharded(module: nn.Module) -> nn.Module:
    """`module` as it was before `fully_shard`, which forbids copies of its units; shares everything with `module`."""
    plain = object.__new__(original_class(module))
    plain.__dict__ = {name: value for name, value in vars(module).items() if not name.startswith(_FSDP_STATE)}
    children = module._modules.items()
    plain._modules = {name: None if child is None else _unsharded(child) for name, child in children}
    return plain


def _random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of `module` with random weights, without hooks or wrappers."""
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(inner, FSDPModule) for inner in module.modules()):
        module = _unsharded(module)
    memo: dict[int, Any] = {id(t): _fresh(t, generator) for t in (*module.parameters(), *module.buffers())}
    # Hooks are shared, not copied: they may hold on to the whole model.
    for inner in module.modules():
        for name, value in vars(inner).items():
            if name.endswith("_hooks") and value is not None:
                memo[id(value)] = type(value)()
        memo |= {id(value): False for value in set_aside(inner)}
    copied = copy.deepcopy(module, memo).eval()
    for inner, replica in zip(module.modules(), copied.modules(), strict=True):
        on_copy(replica, "forward", _code(inner, "forward"))
    return copied


def _bare_copy(owner: nn.Module, router: nn.Module, replica: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of a block without its (large) modules, except `router`, which is replaced by `replica`."""
    bare = copy.copy(owner)
    bare.__dict__["_modules"] = {name: replica for name, child in owner.named_children() if unwrapped(child) is router}
    for kind in ("_parameters", "_buffers"):
        tensors = owner.__dict__[kind]
        bare.__dict__[kind] = {n: None if t is None else _fresh(t, generator) for n, t in tensors.items()}
    on_copy(bare, ROUTE, _code(owner, ROUTE))
    return bare


def _trial(site: RouterSite, generator: torch.Generator) -> tuple[nn.Module, Callable[[], Any]]:
    """A random copy of a router, and a function that runs it on `_TOKENS` random tokens."""
    router = _random_copy(site.router, generator)
    gate = next((p for p in router.parameters() if p.dim() == 2), None)
    if gate is None:
        raise _NotReplayable(
            "it has no 2-D weight [E, H]. If a wrapper has flattened or partitioned the weights, attach before it "
            "wraps the model"
        )
    block = _bare_copy(site.owner, site.router, router, generator) if site.method == ROUTE else None

    def run(hidden: Tensor, *bias: Tensor) -> Any:
        output = router(hidden, *bias)
        if block is None:
            return output
        route = getattr(block, ROUTE)
        names = list(inspect.signature(route).parameters)
        arguments_by_name = {
            "hidden_states": hidden,
            "router_logits": output[0] if isinstance(output, tuple) else output,
        }
        if names == ["hidden_states"]:  # what HunYuan before transformers 5.13 calls the logits
            names = ["router_logits"]
        return route(*(arguments_by_name[name] for name in names))

    hidden = torch.randn(_TOKENS, gate.shape[1], generator=generator).to(gate.dtype)
    bias = torch.randn(gate.shape[0], generator=generator)
    # Some routers want [B, S, H], some are given the selection bias, which their block holds.
    attempts = ((hidden,), (hidden[None],), (hidden, bias), (hidden[None], bias))
    failures = []
    for arguments in attempts:
        failure = _failure(run, arguments)
        if not failure:
            return router, partial(run, *arguments)
        failures.append(failure)
    raise _NotReplayable(f"it could not be run on its own, given tensors of shapes{summary(failures)}")


def _failure(run: Callable[..., Any], arguments: tuple[Tensor, ...]) -> str:
    """Why `run` fails on `arguments`; empty if it does not."""
    try:
        run(*arguments)
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        return f"{', '.join(str(tuple(a.shape)) for a in arguments)}: {type(error).__name__}: {error}"
    return ""


def _leaves(output: Any) -> list[Tensor]:
    """All tensors of an output; lists of numbers count as tensors."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        if all(isinstance(item, (int, float)) for item in output):
            return [torch.tensor(output)]
        return [leaf for item in output for leaf in _leaves(item)]
    return []


def _reached(weights: list[Tensor], router: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """The non-zero gradients of `weights`, by parameter."""
    named = {name: p for name, p in router.named_parameters() if p.requires_grad}
    weights = [w for w in weights if w.requires_grad]
    if not weights:
        return {}
    # A random direction, because weights that are renormalised have a constant sum.
    directions = [torch.randn(w.shape, generator=generator).to(w.dtype) for w in weights]
    gradients = torch.autograd.grad(weights, list(named.values()), directions, allow_unused=True)
    return {name: g for name, g in zip(named, gradients, strict=True) if g is not None and bool((g != 0).any())}


def _prove(site: RouterSite, generator: torch.Generator) -> Choice:
    family = family_of(site.router)
    router, run = _trial(site, generator)

    with TopKRecorder() as recorder:
        output = run()
    live = _leaves(output)
    choices = [
        (choice, own)
        for choice, indices in recorder.calls
        # `[T, 1, E]` is a top-k over the one group of a group limit.
        if tuple(indices.shape[:-1]) in ((_TOKENS,), (1, _TOKENS))
        and family.reports_ids(output, own := indices.reshape(_TOKENS, -1), choice.num_experts)
    ]
    if len(choices) != 1:
        raise _NotReplayable(
            f"expected one top-k over the experts of each token whose indices it returns, saw {len(choices)} "
            f"(and {len(recorder.calls) - len(choices)} others)"
        )
    ((choice, own),) = choices

    with TopKSubstitution(choice, own, None, site) as mode:
        replayed = _leaves(run())
    if mode.count != 1:
        raise _NotReplayable(f"expected one top-k of {choice.top_k} among {choice.num_experts}, saw {mode.count}")
    if not all(torch.equal(a, b) for a, b in zip(live, replayed, strict=True)):
        raise _NotReplayable("under its own ids its outputs differ from live")

    foreign = torch.rand(_TOKENS, choice.num_experts, generator=generator).argsort(-1)[:, : choice.top_k]
    with TopKSubstitution(choice, foreign, None, site):
        output = run()
    if not family.reports_ids(output, foreign, choice.num_experts):
        raise _NotReplayable("it does not return the ids that it was given")
    pairs = [(new, old) for new, old in zip(_leaves(output), live, strict=True) if new.is_floating_point()]
    pairs = [(new, old) for new, old in pairs if not (new.shape == old.shape and torch.equal(new, old))]
    if not pairs:
        raise _NotReplayable("under foreign ids its weights do not follow the ids")
    weighted = foreign < choice.num_experts - family.num_null_experts
    if any(bool((new.reshape(foreign.shape)[weighted] == 0).any()) for new, _ in pairs if new.numel() == own.numel()):
        raise _NotReplayable("under foreign ids some weights are zero: they come from scores cut to the live top-k")

    expected = _reached([old for _, old in pairs], router, generator)
    gradients = _reached([new for new, _ in pairs], router, generator)
    lost = sorted(expected.keys() - gradients.keys())
    if lost or not gradients or not all(bool(g.isfinite().all()) for g in gradients.values()):
        raise _NotReplayable(f"under foreign ids no finite gradient reaches {', '.join(lost) or 'the gate'}")
    if len(recorder.calls) > 1 and _limits_only(choice, site, (own, foreign), run):
        return replace(choice, limited=True)
    return choice


def _limits_only(choice: Choice, site: RouterSite, trials: Iterable[Tensor], run: Callable[[], Any]) -> bool:
    """Whether the router's result is the same when its other top-ks skip replayed rows: all, or every other."""
    for ids, live in itertools.product(trials, (None, torch.arange(0, _TOKENS, 2))):
        outputs = []
        for limited in (False, True):
            with TopKSubstitution(replace(choice, limited=limited), ids, live, site):
                outputs.append(_leaves(run()))
        if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
            return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def prove(site: RouterSite) -> Choice:
    """Prove that top-k substitution replays the router of `site` exactly; returns the `topk` call by which it selects.

    Under its own live ids all outputs are bit-identical to live. Under foreign ids, the ids come back as given, every
    weight is non-zero, and the gradient of the weights reaches each parameter that it reaches live.

    Raises:
        UnsupportedModelError: what failed, for which router class.
    """
    try:
        with torch.device("cpu"):  # `attach` may run where models are built on meta
            return _prove(site, torch.Generator().manual_seed(0))
    except _NotReplayable as refusal:
        raise UnsupportedModelError(
            f"{site.name} ({type(site.router).__name__}) cannot be replayed exactly: {refusal}"
        ) from None


def _kind(site: RouterSite) -> tuple:
    """Key of routers that one proof covers: class, shapes and settings."""
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in site.router.named_parameters())
    codes = tuple(code_of(module, "forward") for module in site.router.modules())
    return type(site.router), type(site.owner), site.method, code_of(site.owner, site.method), codes, shapes


def prove_all(sites: Iterable[RouterSite]) -> list[Choice]:
    """`prove` each of `sites`, routers of one class and shape once.

    Raises:
        UnsupportedModelError: a router that fails, or routers that differ in experts or slots.
    """
    proved: dict[tuple, Choice] = {}
    choices = []
    for site in sites:
        kind = _kind(site)
        if kind not in proved:
            proved[kind] = prove(site)
        choices.append(proved[kind])
    sizes = {(choice.num_experts, choice.top_k) for choice in choices}
    if len(sizes) != 1:
        raise UnsupportedModelError(f"expected one (experts, top_k) for all layers, found {sorted(sizes)}")
    return choices
