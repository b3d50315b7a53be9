"""Tensors that vLLM's layers derive from weights, and whether a sync has updated them. Runs in the engine's workers.

vLLM's layerwise reload recomputes what quantisation methods and attention layers derive. Models hold more: views of a
weight that CPU builds pack into other memory (Mamba's `conv_weights`), copies in another precision, weights that are
fused after loading or at the first forward. A reload leaves these stale without an error.

So a model is inspected when it has been built, before a bracket and after it. Each floating-point tensor that is no
parameter is one of these:
- a constant: there when the model had been built, and the same when its weights were loaded (rotary tables);
- a view: it shared a parameter's memory when the model had been built. If it no longer does, it is copied again;
- derived: all others. The first complete sync must have made or written each of them, else it is refused by name.

Not seen: integers, and what a kernel of its own writes that PyTorch's dispatcher knows nothing of (refused then, though
it may be right). `r3.doctor.arrival` asks the engine itself.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from r3.vllm_compat.reload import on_model_built
from r3.weight_sync.integrity.digest import digest
from r3.weight_sync.worker.held_tensors import held
from r3.weight_sync.worker.load_plan.layer_record import storage_of
from r3.weight_sync.worker.load_plan.plan import Region, TensorLayout, layout_of

logger = logging.getLogger(__name__)

_KEY = "_r3_origins"
_COPIED_BYTES = 1 << 16  # larger constants are known by their digest


@dataclass(frozen=True, kw_only=True)
class View:
    """A tensor that shared memory with a parameter when the model had been built.

    Attributes:
        layer, parameter: the module that has the parameter, and its name there.
        region: of the parameter, that the tensor is.
    """

    layer: str
    parameter: str
    region: Region


@dataclass(frozen=True, kw_only=True)
class Origins:
    """A model that had been built and had no weights yet: its tensors besides parameters, by path."""

    constants: dict[str, tuple[TensorLayout, "Tensor | int"]] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)


def note_origins(model: nn.Module) -> None:
    """Record the tensors of `model`. Called after it has been built, and before any weight is loaded."""
    parameters: dict[int, tuple[str, str, Tensor]] = {}
    for name, layer in model.named_modules():
        for own, tensor in layer._parameters.items():
            if tensor is not None and not tensor.is_meta and tensor.numel():
                parameters.setdefault(storage_of(tensor), (name, own, tensor))
    origins = Origins()
    for path, tensor in beside(model):
        if (home := parameters.get(storage_of(tensor))) is None:
            origins.constants[path] = (layout_of(tensor), _content(tensor))
        else:
            layer, own, parameter = home
            offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
            region = Region(size=tuple(tensor.shape), stride=tuple(tensor.stride()), offset=offset)
            origins.views[path] = View(layer=layer, parameter=own, region=region)
    model.__dict__[_KEY] = origins


def watch_construction() -> None:
    """Have `note_origins` called on every model that vLLM builds in this process from here on.

    If this vLLM has no hook for it, nothing is known of its models, and a warning says so.
    """
    on_model_built(note_origins, _KEY)


class DerivedTensors:
    """The tensors of one model that a bracket must update besides its parameters: see the module's docstring.

    Args:
        model: the worker's model. If it was built before `watch_construction`, nothing is known of it, and nothing
            refused.
        caches: storages of the caches of keys, values and states, which are no weights.
        constants: patterns of paths (`*.scale`) that are known to be none of the weights' business.

    Attributes:
        known_constants: `constants`.
        views: by the layer that has the parameter: views that no longer share its memory.
    """

    def __init__(self, model: nn.Module, caches: Collection[int] = (), constants: Collection[str] = ()) -> None:
        self._model = model
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._caches = caches
        self.known_constants = constants
        self._origins: Origins | None = model.__dict__.get(_KEY)
        self._before: dict[str, Tensor] = {}
        self.views = self._parted_views()

    def _parted_views(self) -> dict[str, list[tuple[Tensor, View]]]:
        parted: dict[str, list[tuple[Tensor, View]]] = {}
        origins = {} if self._origins is None else self._origins.views
        for path, tensor in beside(self._model) if origins else ():
            if (view := origins.get(path)) is not None:
                parameter = self._modules[view.layer]._parameters.get(view.parameter)
                if parameter is None or storage_of(parameter) != storage_of(tensor):
                    parted.setdefault(view.layer, []).append((tensor, view))
        return parted

    @cached_property
    def kept_buffers(self) -> list[tuple[str, str]]:
        """(layer, name) of buffers that vLLM's bracket loses, or copies uninitialised memory into: no checkpoint has
        them, and they were views of parameters when the model had been built, or have been the same ever since."""
        if self._origins is None:
            return []
        buffers = []
        for path in (*self._origins.views, *self._origins.constants):
            layer, _, name = path.rpartition(".")
            module = self._modules.get(layer)
            if module is None or name not in module._non_persistent_buffers_set:
                continue
            constant = self._origins.constants.get(path)
            if constant is None or (module._parameters and _is_content(module._buffers[name], *constant)):
                buffers.append((layer, name))
        return buffers

    def refresh(self, layer: str) -> None:
        """Copy into the views of `layer`'s parameters what these hold now: weights as they were loaded."""
        for tensor, view in self.views.get(layer, ()):
            tensor.data.copy_(view.region.of(getattr(self._modules[layer], view.parameter).data))

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Context in which views are copied from their weights when these have been loaded, before they are packed."""
        methods = [(name, self._modules[name].quant_method) for name in self.views if self.processed(name)]
        for name, method in methods:
            method.process_weights_after_loading = self._refresh_first(name, method)
        try:
            yield
        finally:
            for _, method in methods:
                del method.process_weights_after_loading

    def _refresh_first(self, name: str, method: Any) -> Callable[[nn.Module], Any]:
        process = method.process_weights_after_loading

        def refresh_and_process(layer: nn.Module) -> Any:
            self.refresh(name)
            return process(layer)

        return refresh_and_process

    def processed(self, layer: str) -> bool:
        """Whether vLLM processes the weights of `layer` once it has loaded them."""
        return hasattr(getattr(self._modules[layer], "quant_method", None), "process_weights_after_loading")

    def look(self) -> None:
        """Record the derived tensors before a bracket is opened."""
        self._before = {}
        if self._origins is None:
            logger.warning("Not known how this model was built: what derives from its weights is not looked at")
            return
        parameters = {storage_of(p) for p in self._model.parameters() if not p.is_meta and p.numel()}
        for path, tensor in beside(self._model):
            if storage_of(tensor) in parameters or storage_of(tensor) in self._caches:
                continue
            constant = self._origins.constants.get(path)
            named = any(fnmatchcase(path, pattern) for pattern in self.known_constants)
            if not named and (constant is None or not _is_content(tensor, *constant)):
                self._before[path] = tensor  # which keeps its storage's address from being used again

    def written_by(self, written: Collection[int]) -> list[str]:
        """Paths of the tensors recorded by `look` whose memory is among `written`."""
        return [path for path, tensor in self._before.items() if storage_of(tensor) in written]

    def stale(self, written: Collection[int]) -> list[str]:
        """Paths of tensors that a bracket has not replaced or written since `look`, or that cannot be refreshed.

        Args:
            written: storages that were written while the bracket was open.
        """
        fresh = {*written, *(storage_of(tensor) for views in self.views.values() for tensor, _ in views)}
        now = dict(beside(self._model))
        same = [
            path
            for path, tensor in self._before.items()
            if path in now and storage_of(now[path]) == storage_of(tensor) and storage_of(tensor) not in fresh
        ]
        self._before = {}
        return [f"{path}: {now[path].dtype} {tuple(now[path].shape)}" for path in same]


def beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every floating-point tensor of a model's modules that is none of their parameters by name."""
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        for path, tensor in (*layer._buffers.items(), *held(layer)):
            if tensor is not None and tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
                yield prefix + path, tensor


def _content(tensor: Tensor) -> Tensor | int:
    on_cpu = tensor.detach().to("cpu", copy=True).contiguous()
    return on_cpu if on_cpu.nbytes <= _COPIED_BYTES else digest(on_cpu)


def _is_content(tensor: Tensor, layout: TensorLayout, content: Tensor | int) -> bool:
    if layout_of(tensor) != layout:
        return False
    now = _content(tensor)
    if isinstance(now, Tensor) and isinstance(content, Tensor):
        return torch.equal(now.reshape(-1).view(torch.uint8), content.reshape(-1).view(torch.uint8))
    return bool(now == content)
