"""Layers that keep their weights when a sync leaves out frozen modules. Runs in the engine's workers.

The sender names module paths of the checkpoint (`model.visual`); vLLM's own map gives the names in its model. Layers
below these must receive nothing in this sync, and all other layers everything.
"""

from collections.abc import Iterable
from typing import Any

from r3.errors import summary


def kept_layers(model: Any, frozen: Iterable[str], sent: Iterable[str]) -> dict[str, list[str]]:
    """For each path of `frozen`, the layers of vLLM's `model` below it that have weights of their own.

    Args:
        model: a model of vLLM's.
        frozen: module paths of the checkpoint; a worker may have none of its layers (pipeline parallel).
        sent: names of the checkpoint's tensors that will come.

    Raises:
        ValueError: the sync sends tensors of a frozen module.
    """
    paths = {path: _in_engine(model, path) for path in frozen}
    below = tuple(paths.values())
    if below and (both := [name for name in sent if _in_engine(model, name).startswith(below)]):
        raise ValueError(f"frozen={sorted(paths)}, and yet sent:{summary(both)}")
    layers = [name for name, layer in model.named_modules() if any(True for _ in layer.parameters(recurse=False))]
    return {path: [n for n in layers if f"{n}.".startswith(there)] for path, there in paths.items()}


def _in_engine(model: Any, path: str) -> str:
    """The engine's name for `path` of the checkpoint, with a dot at its end; empty if vLLM skips it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    names = [f"{path}."] if mapper is None else mapper.apply_list([f"{path}."])
    return names[0] if names else ""
