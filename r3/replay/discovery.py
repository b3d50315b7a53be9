"""Where the routers of a model are: found in the live module tree, with the decoder layer that holds each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from r3.errors import UnsupportedModelError, summary

# Wrappers that put a component of their own into a module's path.
_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})


@dataclass(frozen=True, eq=False)
class RouterSite:
    """One router: its path in the model, the decoder layer that holds it, and that layer's index."""

    name: str
    layer_id: int
    layer: nn.Module
    router: nn.Module


def _router_classes(model: nn.Module) -> set[type[nn.Module]]:
    """Classes that the model's own output recording calls routers."""
    classes = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        recorded = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", ())
        for entry in recorded if isinstance(recorded, (list, tuple)) else (recorded,):
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type) and target is not nn.Linear:
                classes.add(target)
    return classes


def _decoder_layer(model: nn.Module, path: str) -> tuple[int, nn.Module] | None:
    """Index and module of the outermost `nn.ModuleList` entry on `path`."""
    module = model
    for part in path.split("."):
        parent, module = module, getattr(module, part)
        if isinstance(parent, nn.ModuleList):
            while len(children := dict(module.named_children())) == 1 and _WRAPPERS & children.keys():
                (module,) = children.values()
            return int(part), module
    return None


def _sites(model: nn.Module) -> Iterator[RouterSite]:
    classes = tuple(_router_classes(model))
    for path, module in model.named_modules():
        if not isinstance(module, classes):
            continue
        found = _decoder_layer(model, path)
        if found is None:
            raise UnsupportedModelError(f"router {path} ({type(module).__name__}) is not inside a list of layers")
        yield RouterSite(path, found[0], found[1], module)


def find_routers(model: nn.Module) -> list[RouterSite]:
    """The routers of `model`, by ascending decoder layer.

    Raises:
        UnsupportedModelError: no router at all (a dense model, or a family that names none), or two in one layer.
    """
    sites = sorted(_sites(model), key=lambda site: site.layer_id)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no router that can be replayed: expected modules of the class that "
            "`_can_record_outputs['router_logits']` names. A dense model routes nothing; train it without replay "
            "(trainer.policy.fsdp_config.moe_enable_routing_replay=false)."
        )
    twice = [
        f"decoder layer {a.layer_id}: {a.name} and {b.name}" for a, b in pairwise(sites) if a.layer_id == b.layer_id
    ]
    if twice:
        raise UnsupportedModelError(f"expected one router a decoder layer, found:{summary(twice)}")
    return sites
