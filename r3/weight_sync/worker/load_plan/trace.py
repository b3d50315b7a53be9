"""Learns a load plan from vLLM's own loaders, in one complete sync, and proves it there.

Watched, operation by operation, while vLLM loads: which copies go from a checkpoint tensor (by its storage, which
every view shares) to a layer's tensors. A layer is planned only if, on this worker and with these weights,
1. its tensors were written by such copies alone, of one dtype, and by constants; each element exactly once;
2. processing the weights never computed with them: no operation read them other than to make a view;
3. processing left them where they were, kept no other tensor (caches, packed copies), added and removed none;
4. the tensors that the engine computes with are equal, bit for bit, to the regions that were copied: what does not go
   through PyTorch's dispatcher (kernels launched by hand) is caught here, if the weights are not all the same number;
5. none of its sources also feeds a layer that fails one of these.
All else stays on vLLM's path.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from r3.vllm_compat.reload import is_deferred, never_counted
from r3.weight_sync.worker.load_plan.layer_record import Comparison, Record, held_tensors, storage_of
from r3.weight_sync.worker.load_plan.plan import Chunk, Copy, Fill, LoadPlan, Region, coalesced, layout_of
from r3.weight_sync.worker.load_plan.prove import build_plan

TensorKey = tuple[str, str]  # layer, tensor

# These operations read only a tensor's shape, dtype and device.
SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for kind in ("empty", "zeros", "ones", "full")
    for name in (f"{kind}_like", f"new_{kind}", f"new_{kind}_strided")
) | {"aten::is_pinned", "aten::is_same_size", "aten::sym_size", "aten::sym_stride", "aten::sym_numel"}


class LoadTracer:
    """Watches one sync.

    Args:
        model: the worker's model, after the bracket was opened.
        kernel: layer -> tensor name -> tensor that the engine computes with.
    """

    def __init__(self, model: nn.Module, kernel: dict[str, dict[str, Tensor]]) -> None:
        self._model = model
        self._kernel = kernel
        self._names = {module: name for name, module in model.named_modules()}
        self._manifest: dict[str, tuple[tuple[int, ...], str]] = {}
        # The weak references keep addresses of storages from being used again, not their memory.
        self._sources: dict[int, str] = {}
        self._references: list[StorageWeakRef] = []
        self._live: dict[int, list[TensorKey]] = {}
        self._in_place: set[TensorKey] = set()  # never moved to meta: loaded at once
        for layer, tensors in kernel.items():
            module = model.get_submodule(layer)
            for name, tensor in tensors.items():
                self._live.setdefault(storage_of(tensor), []).append((layer, name))
                if getattr(module, name, None) is tensor:
                    self._in_place.add((layer, name))
        # Attention layers are processed at each close of a bracket, after all others; their own tensors are never
        # planned.
        self._deferred = {name for name, module in model.named_modules() if is_deferred(module)}
        self._records: dict[str, Record] = {}
        self._direct: dict[str, Record] = {}
        self._current: Record | None = None
        self._closing = False
        self._paused = False
        self._computed: set[str] = set()
        self._wanted: set[str] = set()  # by a loader, before it was known where to
        self.written: set[int] = set()  # storages, by whatever vLLM ran
        self.written_by_loaders: set[int] = set()  # the same, but not for a layer that was processed, or at the end
        self._checks: list[Comparison] = []

    @contextmanager
    def watching(self, chunk: Chunk, *, closing: bool = False) -> Iterator[None]:
        """Record what vLLM does in this context with the tensors of `chunk` and of earlier ones.

        Args:
            chunk: contiguous tensors that own their memory.
            closing: vLLM is closing the bracket. Attention layers, processed last and at each close, may then read
                weights.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        for name, tensor in chunk:
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
            self._sources[storage_of(tensor)] = name
            self._manifest[name] = (tuple(tensor.shape), str(tensor.dtype))
        patches = {
            "_layerwise_process": self._process,
            "materialize_layer": self._materialize,
            "_copy_and_restore_kernel_tensors": self._close,
        }
        originals = {name: getattr(layerwise, name) for name in patches}
        self._closing = closing
        try:
            for name, patch in patches.items():
                setattr(layerwise, name, functools.partial(patch, originals[name]))
            with _Watch(self):
                yield
        finally:
            for name, original in originals.items():
                setattr(layerwise, name, original)

    def plan(self) -> LoadPlan:
        """The load plan of a complete sync, after its bracket has closed. Waits for the device, once."""
        records = (*self._records.values(), *self._direct.values())
        links = [(source, record.layer) for record in records for source in record.copies]
        self._merge_direct()
        linked = {source for source, _ in links}
        return build_plan(
            self._model,
            self._manifest,
            self._records,
            self._checks,
            links=links,
            shared=self._live.values(),
            optional=never_counted(),
            slow_sources=self._computed | (self._wanted - linked),
        )

    # Around three steps of vLLM's processing of a layer.

    def _process(self, original: Any, layer: nn.Module, info: Any) -> None:
        name = self._names[layer]
        record = Record(name, type(layer).__name__, self._kernel.get(name, {}))
        if name in self._records:
            record.mark_unplannable("it was processed twice")
        record.before = held_tensors(layer)
        self._records[name] = self._current = record
        try:
            original(layer, info)
        finally:
            self._current = None
        with self._pause():
            record.copies = {source: coalesced(copies) for source, copies in record.copies.items()}
            self._checks += record.checks() if not record.reason else ()
            record.close()

    def _materialize(self, original: Any, layer: nn.Module, info: Any) -> None:
        with self._pause():
            original(layer, info)
        if self._current is not None:
            self._current.open(layer)

    def _close(self, original: Any, layer: nn.Module, info: Any) -> None:
        if self._current is not None:
            self._current.inspect(layer)
        with self._pause():
            original(layer, info)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # Callbacks of the dispatcher.

    def on_op(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """One operation that has just run."""
        if function._schema.is_mutable:
            self._on_write(function, args, kwargs)
        if self._paused or function._schema.name in SHAPE_ONLY:
            return
        if function is torch.ops.aten.copy_.default:
            self._on_copy(args[0], args[1])
            return
        results = {storage_of(tensor) for tensor in _tensors_in(result)}
        for tensor in _tensors_in((args, kwargs)):
            storage = storage_of(tensor)
            if storage in results and not function._schema.is_mutable:
                continue  # a view
            if (source := self._sources.get(storage)) is not None:
                self._computed.add(source)
            if (where := self._target(storage)) is None:
                continue
            if function in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
                self._on_fill(where, tensor, args[1] if len(args) > 1 else 0)
            elif function._schema.is_mutable or not self._may_read(where):
                reason = f"loading or processing computes with its weights ({function._schema.name})"
                self._record_of(where).mark_unplannable(reason)

    def _on_write(self, function: Any, args: tuple, kwargs: dict) -> None:
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[index] if index < len(args) else kwargs.get(argument.name)
                storages = {storage_of(tensor) for tensor in _tensors_in(written)}
                self.written |= storages
                if self._current is None and not self._closing:
                    self.written_by_loaders |= storages

    def _on_copy(self, target: Tensor, source: Tensor) -> None:
        name = self._sources.get(storage_of(source))
        if target.is_meta:
            if name is not None:
                self._wanted.add(name)
            return
        if not target.numel():
            return
        if storage_of(target) == storage_of(source) and _region(target) == _region(source):
            return  # onto itself
        if (read := self._target(storage_of(source))) is not None and not self._may_read(read):
            self._record_of(read).mark_unplannable("loading or processing copies its weights elsewhere")
        where = self._target(storage_of(target))
        if where is None:
            if name is not None:
                self._computed.add(name)
            return
        record = self._record_of(where)
        if name is None:
            record.mark_unplannable("its weights are computed or cast on the way")
            return
        region, expanded = self._within(where, record, target), _region(source.expand_as(target))
        copy = Copy(
            layer=where[0],
            tensor=where[1],
            size=region.size,
            source_stride=expanded.stride,
            target_stride=region.stride,
            source_offset=expanded.offset,
            target_offset=region.offset,
        )
        record.copies.setdefault(name, []).append(copy)
        if name not in record.sources:
            flat = source.as_strided((source.untyped_storage().nbytes() // source.element_size(),), (1,), 0)
            record.sources[name] = flat
        if source.dtype != target.dtype or str(source.dtype) != self._manifest[name][1]:
            record.mark_unplannable("its weights are cast when they are loaded")
        elif any(n > 1 and step == 0 for n, step in zip(copy.size, copy.source_stride, strict=True)):
            record.mark_unplannable("a value is spread over several elements")

    def _on_fill(self, where: TensorKey, target: Tensor, value: float) -> None:
        if target.numel():
            record = self._record_of(where)
            record.fills.append(Fill(tensor=where[1], region=self._within(where, record, target), value=value))

    def _within(self, where: TensorKey, record: Record, view: Tensor) -> Region:
        """The region of a layer's tensor that `view` covers."""
        tensor = record.loading[where[1]] if record is self._current else self._kernel[where[0]][where[1]]
        region = _region(view)
        return Region(size=region.size, stride=region.stride, offset=region.offset - _region(tensor).offset)

    def _target(self, storage: int) -> TensorKey | None:
        """(layer, name) of the tensor that owns this memory; None if no layer's does."""
        if self._current is not None and (name := self._current.storages.get(storage)) is not None:
            return self._current.layer, name
        return next((place for place in self._live.get(storage, ()) if place[0] not in self._deferred), None)

    def _may_read(self, where: TensorKey) -> bool:
        """Whether vLLM will read this tensor again each time it closes a bracket."""
        if self._current is None:
            return self._closing
        if self._current.layer != where[0]:
            self._current.mark_unplannable("processing computes with another layer's weights")
        return False

    def _record_of(self, where: TensorKey) -> Record:
        if self._current is not None:
            if self._current.layer == where[0]:
                return self._current
            self._current.mark_unplannable("processing touches another layer's weights")
        record = self._direct.setdefault(where[0], Record(where[0], "", self._kernel[where[0]]))
        if where not in self._in_place:
            record.mark_unplannable("it is touched after it was complete")
        return record

    def _merge_direct(self) -> None:
        """Add copies that went straight into the engine's tensors to the layers' records."""
        for name, direct in self._direct.items():
            kind = type(self._model.get_submodule(name)).__name__
            layouts = {tensor: layout_of(kernel) for tensor, kernel in direct.kernel.items()}
            record = self._records.setdefault(name, Record(name, kind, direct.kernel, layouts))
            if direct.reason:
                record.mark_unplannable(direct.reason)
            # vLLM counts by loading: what stays off the meta device is loaded then, and once more with its layer.
            done = {copy.tensor for group in record.copies.values() for copy in group}
            new = {source: [c for c in copies if c.tensor not in done] for source, copies in direct.copies.items()}
            direct.copies = {source: coalesced(copies) for source, copies in new.items() if copies}
            direct.fills = [fill for fill in direct.fills if fill.tensor not in done]
            self._checks += direct.checks() if not record.reason else ()
            for source, copies in direct.copies.items():
                record.copies.setdefault(source, []).extend(copies)
            record.fills += direct.fills
            direct.close()


class _Watch(TorchDispatchMode):
    def __init__(self, learner: LoadTracer) -> None:
        super().__init__()
        self._learner = learner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._learner.on_op(func, args, kwargs, result)
        return result


def _region(tensor: Tensor) -> Region:
    return Region(size=tuple(tensor.shape), stride=tuple(tensor.stride()), offset=int(tensor.storage_offset()))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in memory, in nested arguments."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
