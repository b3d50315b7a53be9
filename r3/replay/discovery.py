"""Finds the routers of a model in the live module tree, with the decoder layer that holds each.

A router is the child `gate` or `router` of a module that has a child `experts`; this holds for nearly every family of
transformers, and for remote code that follows them. `r3.replay.families` knows the others.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from r3.errors import UnsupportedModelError, summary
from r3.replay.families import family_of, has_entry
from r3.wrappers import own_path, unwrapped

# A block, or its experts, chooses in this method if the router itself only returns logits.
ROUTE = "route_tokens_to_experts"


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterSite:
    """One router, and the method in which it selects experts.

    Attributes:
        name: path of the router in the model.
        layer_id: index of the decoder layer that holds it.
        layer: that layer.
        router: the module that has the gate's weight.
        owner: the module in whose `method` the top-k runs: the router, its block, or the block's experts.
        method: `forward`, or `route_tokens_to_experts`.
    """

    name: str
    layer_id: int
    layer: nn.Module
    router: nn.Module
    owner: nn.Module
    method: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterMap:
    """The routers of a model.

    Attributes:
        sites: those that replay has to reach, by ascending decoder layer.
        layers: all decoder layers, with or without a router.
        table_layers: indices of layers that select experts by token id, ascending.
    """

    sites: tuple[RouterSite, ...]
    layers: tuple[nn.Module, ...]
    table_layers: tuple[int, ...] = ()


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, router, block) of every router."""
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for name in ("gate", "router"):
            if name not in children:
                continue
            router = unwrapped(children[name])
            if "experts" in children or has_entry(router):
                yield f"{path}.{name}" if path else name, router, module
        if has_entry(module) and family_of(module).unsupported_reason:
            yield path, module, module


def _routing_method(router: nn.Module, block: nn.Module) -> tuple[nn.Module, str]:
    experts = getattr(block, "experts", None)
    for owner in (block, unwrapped(experts) if isinstance(experts, nn.Module) else None):
        if owner is not None and hasattr(owner, ROUTE):
            return owner, ROUTE
    return router, "forward"


def _layer_list(model: nn.Module, path: str) -> tuple[nn.ModuleList, int]:
    """The outermost `nn.ModuleList` on `path`, and the index in it."""
    module = model
    for part in path.split("."):
        parent, module = module, getattr(module, part)
        if isinstance(parent, nn.ModuleList):
            return parent, int(part)
    raise UnsupportedModelError(f"router {path} is not inside a list of decoder layers")


def _of_decoder(model: nn.Module, lists: dict[nn.ModuleList, list[RouterSite]]) -> nn.ModuleList:
    """The list of decoder layers that has routers; a vision tower may have a list of its own."""
    if len(lists) > 1:
        outermost = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if outermost is not None:
            inside = set(outermost.get_decoder().modules())
            lists = {layers: sites for layers, sites in lists.items() if layers in inside} or lists
    if len(lists) > 1:
        firsts = [f"{sites[0].name}: {len(sites)} routers" for sites in lists.values()]
        raise UnsupportedModelError(
            "expected all routers in one list of decoder layers, found them in several; attach to the part that is "
            f"trained. First routers:{summary(firsts)}"
        )
    return next(iter(lists))


def _require_one_pass(layer: nn.Module, name: str) -> None:
    """Refuse a decoder that runs its layers several times: routing has one column for a layer.

    Inkling2Loop (transformers 5.24) does, from `loop_layer_index_start` on.
    """
    configs = (getattr(module, "config", None) for module in layer.modules())
    passes = max((getattr(config, "loop_num_passes", None) or 1 for config in configs), default=1)
    if passes > 1:
        raise UnsupportedModelError(
            f"{name} runs decoder layers {passes} times in a forward (loop_num_passes): expected one choice of experts "
            "a token and layer. Only a model of one pass can be replayed"
        )


def find_routers(model: nn.Module) -> RouterMap:
    """The routers that replay has to reach in `model`, a transformers model or any wrapper around one.

    Raises:
        UnsupportedModelError: no router at all (a dense model), routers that expert ids do not determine, two in one
            decoder layer, or several lists of decoder layers.
    """
    lists: dict[nn.ModuleList, list[RouterSite]] = defaultdict(list)
    refused = []
    hash_routed = []
    for path, router, block in _routers(model):
        family = family_of(router)
        if family.unsupported_reason:
            refused.append(f"{path} ({type(router).__name__}): {family.unsupported_reason}")
        elif family.hash_routed:
            hash_routed.append(_layer_list(model, path)[1])
        elif family.is_replayed(own_path(path)):
            layers, index = _layer_list(model, path)
            owner, method = _routing_method(router, block)
            lists[layers].append(
                RouterSite(
                    name=path,
                    layer_id=index,
                    layer=unwrapped(layers[index]),
                    router=router,
                    owner=owner,
                    method=method,
                )
            )
    if refused:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be replayed by expert ids:{summary(refused)}")
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no router that can be replayed: expected modules `gate` or `router` beside "
            "`experts`. A dense model routes nothing; train it without replay "
            "(trainer.policy.fsdp_config.moe_enable_routing_replay=false)."
        )
    layers = _of_decoder(model, lists)
    sites = sorted(lists[layers], key=lambda site: site.layer_id)
    twice = [f"layer {a.layer_id}: {a.name} and {b.name}" for a, b in pairwise(sites) if a.layer_id == b.layer_id]
    if twice:
        raise UnsupportedModelError(f"expected one router a decoder layer, found:{summary(twice)}")
    _require_one_pass(unwrapped(layers[0]), type(model).__name__)
    return RouterMap(
        sites=tuple(sites),
        layers=tuple(unwrapped(layer) for layer in layers),
        table_layers=tuple(sorted(hash_routed)),
    )
