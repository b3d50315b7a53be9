"""What the experts of a router really got. Most families hand it to one `experts` module; the rest are special."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Report = Callable[[Tensor, Tensor], None]  # (ids [T, K], weights [T, K])
# Hooks `router`, found in `block`, for as long as the context is open.
Observer = Callable[[nn.Module, nn.Module, Report], Any]


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


_IDS = ("top_k_index", "router_indices")
_WEIGHTS = ("top_k_weights", "routing_weights")


def _first(arguments: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    (found,) = (arguments[name] for name in names if name in arguments)
    return found


def at_experts(block: nn.Module, router: nn.Module, report: Report) -> Any:
    """`experts(hidden, ids, weights)`, under any of the names that these arguments have."""

    def before(module, args, kwargs):
        arguments = _named(module, args, kwargs)
        report(_first(arguments, _IDS), _first(arguments, _WEIGHTS))

    return hooks(block.experts.register_forward_pre_hook(before, with_kwargs=True))


def zaya(block: nn.Module, router: nn.Module, report: Report) -> Any:
    """The router hides a skipped token as expert 0 with weight 0."""

    def unhide(ids: Tensor, weights: Tensor) -> None:
        report(ids.masked_fill(weights == 0, block.experts.num_experts), weights)

    return at_experts(block, router, unhide)


def llama4(block: nn.Module, router: nn.Module, report: Report) -> Any:
    """The experts run on every token; the weight is in their input, and 0 for those not chosen."""
    hidden: list[Tensor] = []

    def before_router(_, args):
        hidden[:] = [args[0].detach().double()]

    def before_experts(_, args):
        (x,) = hidden
        scaled = args[0].double().view(-1, *x.shape)  # [E, T, H]
        weights = ((scaled * x).sum(-1) / x.pow(2).sum(-1)).T
        chosen = (weights != 0).sum(-1)
        if not bool((chosen == router.top_k).all()):
            raise AssertionError(f"expected {router.top_k} weighted experts a token, got {chosen.tolist()}")
        top = weights.topk(router.top_k)
        report(top.indices, top.values)

    return hooks(
        router.register_forward_pre_hook(before_router), block.experts.register_forward_pre_hook(before_experts)
    )


def by_expert(block: nn.Module, router: nn.Module, report: Report) -> Any:
    """Tokens come sorted by expert: counts of each expert, the token of each row, and its weight."""
    routed: list[tuple] = []

    def after_router(_, __, output):
        routed[:] = [output]

    def before_experts(_, args):
        ((_, token, weight, *_),) = routed
        expert = torch.arange(len(args[1])).repeat_interleave(torch.tensor(args[1])).to(token.device)
        order = token.argsort(stable=True)
        report(expert[order].view(-1, router.top_k), weight[order].view(-1, router.top_k))

    return hooks(
        router.register_forward_hook(after_router), block.input_linear.register_forward_pre_hook(before_experts)
    )


@contextmanager
def inside_experts(block: nn.Module, router: nn.Module, report: Report) -> Iterator[None]:
    """The experts make the choice themselves, in a method of their own (aria in transformers 5.17)."""
    choose = block.experts.route_tokens_to_experts

    def reported(logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = choose(logits)
        report(ids, weights)
        return ids, weights

    block.experts.route_tokens_to_experts = reported
    try:
        yield
    finally:
        del block.experts.route_tokens_to_experts
