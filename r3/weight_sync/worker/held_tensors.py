"""Tensors that a layer of vLLM holds aside from its own parameters and buffers: kernels, settings, closures."""

import functools
import inspect
from collections.abc import Iterator
from types import CellType
from typing import Any

from torch import Tensor, nn

# Their objects hold no weights, and much else: what was compiled and captured, caches of keys and values, the engine.
_CLOSED = ("torch", "builtins", "numpy", "transformers", "vllm.config", "vllm.compilation", "vllm.v1.worker", "r3")
_OWN = ("_parameters", "_buffers", "_modules")
_CACHES = ("kv_cache", "kv_caches")


def held(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of what a layer and its quantisation method hold aside from the layer's parameters and buffers.

    Looks into containers, closures and objects, not into other modules. A tensor comes once, by one of its paths.
    """
    method = layer.__dict__.get("quant_method") or layer._modules.get("quant_method")
    stack = [(name, value) for name, value in vars(layer).items() if name not in (*_OWN, *_CACHES)]
    stack += [(f"quant_method.{name}", value) for name, value in vars(method).items()] if method is not None else []
    seen: set[int] = {id(layer), id(method)}
    while stack:
        path, value = stack.pop()
        if id(value) in seen or isinstance(value, (str, int, float, type, nn.Module)):
            continue
        seen.add(id(value))
        if not isinstance(value, Tensor):
            stack += [(path + step, inner) for step, inner in _inside(value)]
        elif not value.is_meta:
            yield path, value


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    if isinstance(value, functools.partial):
        named = [(f".keywords[{key!r}]", inner) for key, inner in value.keywords.items()]
        return [(".func", value.func), *((f".args[{i}]", inner) for i, inner in enumerate(value.args)), *named]
    if inspect.ismethod(value):
        return [(".__self__", value.__self__)]
    if inspect.isfunction(value):
        inner = [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [(f".<closure {index}>", cell) for index, cell in enumerate(inner)]
    if isinstance(value, CellType):
        return [("", value.cell_contents)] if value != CellType() else []
    if type(value).__module__.startswith(_CLOSED):
        return []
    return [(f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items() if name not in _CACHES]
