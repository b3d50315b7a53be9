"""The trace of one layer while vLLM loads and processes it, and the comparison that proves its plan."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from r3.weight_sync.worker.held_tensors import held
from r3.weight_sync.worker.load_plan.plan import Copy, Fill, Region, TensorLayout, layout_of

Comparison = tuple[str, str, Tensor]  # layer, what is wrong with it if this is true: bool, no dimensions

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COMPARED_AT_ONCE = 1 << 25  # elements; bounds the memory of a comparison


@dataclass
class Record:
    """One layer's record."""

    layer: str
    kind: str  # class
    kernel: dict[str, Tensor]  # what the engine computes with
    layouts: dict[str, TensorLayout] = field(default_factory=dict)  # of what is loaded
    copies: dict[str, list[Copy]] = field(default_factory=dict)  # by source
    fills: list[Fill] = field(default_factory=list)
    reason: str = ""  # why it cannot be planned
    # Only while the layer is loaded and processed:
    loading: dict[str, Tensor] = field(default_factory=dict)
    storages: dict[int, str] = field(default_factory=dict)  # of `loading`
    sources: dict[str, Tensor] = field(default_factory=dict)  # flat
    before: dict[int, Tensor] = field(default_factory=dict)  # what the layer held aside from its own tensors

    def mark_unplannable(self, reason: str) -> None:
        self.reason = self.reason or reason

    def regions(self, tensor: str) -> list[Region]:
        """The regions of a tensor that copies and constants write."""
        copied = [copy.target for group in self.copies.values() for copy in group if copy.tensor == tensor]
        return copied + [fill.region for fill in self.fills if fill.tensor == tensor]

    def open(self, layer: nn.Module) -> None:
        """Start the record: the layer has memory to be loaded into."""
        self.loading = own_tensors(layer)
        self.storages = {storage_of(tensor): name for name, tensor in self.loading.items()}
        self.layouts = {name: layout_of(tensor) for name, tensor in self.loading.items()}

    def inspect(self, layer: nn.Module) -> None:
        """Inspect the layer after processing, before its weights are copied into the engine's tensors."""
        now = own_tensors(layer)
        if not (now.keys() == self.kernel.keys() == self.loading.keys()):
            self.mark_unplannable("processing adds or removes parameters")
        for name in now.keys() & self.kernel.keys() & self.loading.keys():
            loaded = self.loading[name]
            if not layout_of(now[name]) == layout_of(self.kernel[name]) == layout_of(loaded):
                self.mark_unplannable("processing changes a parameter's shape, strides or dtype")
            elif (storage_of(now[name]), now[name].storage_offset()) != (storage_of(loaded), loaded.storage_offset()):
                self.mark_unplannable("processing replaces a parameter")
        known = self.before.keys() | {storage_of(tensor) for tensor in self.kernel.values()}
        if held_tensors(layer).keys() - known:
            self.mark_unplannable("processing keeps a tensor that is no parameter")

    def close(self) -> None:
        self.loading, self.storages, self.sources, self.before = {}, {}, {}, {}

    def checks(self) -> Iterator[Comparison]:
        """Queue the comparison of the engine's tensors with the copied regions. Does not wait for the device."""
        for source, copies in self.copies.items():
            for copy in copies:
                kernel = self.kernel[copy.tensor]
                original, final = _bits(copy.source.of(self.sources[source])), _bits(copy.target.of(kernel))
                same = torch.ones((), dtype=torch.bool, device=kernel.device)
                constant = torch.ones((), dtype=torch.bool, device=original.device)
                first = original[(0,) * original.ndim]
                for one, other in _slices(original, final):
                    same &= (one.to(other.device) == other).all()
                    constant &= (one == first).all()
                yield self.layer, "the engine's weights differ from the checkpoint's", ~same
                if kernel.ndim > 1:
                    yield self.layer, "constant weights prove nothing", constant
        for fill in self.fills:
            kernel = self.kernel[fill.tensor]
            value = _bits(torch.full((1,), fill.value, dtype=kernel.dtype, device=kernel.device))
            same = (_bits(fill.region.of(kernel)) == value).all()
            yield self.layer, "a constant of the loaders is not in the engine's weights", ~same


def storage_of(tensor: Tensor) -> int:
    """The storage that all views of a tensor share: unique while the storage, or a weak reference to it, exists."""
    return tensor.untyped_storage()._cdata


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None}


def held_tensors(layer: nn.Module) -> dict[int, Tensor]:
    """Tensors that a layer holds aside from its parameters and buffers (`worker.held_tensors`), by storage."""
    return {storage_of(tensor): tensor for _, tensor in held(layer)}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def _slices(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if not one.ndim or one.numel() <= COMPARED_AT_ONCE:
        yield one, other
        return
    rows = max(1, COMPARED_AT_ONCE * one.shape[0] // one.numel())
    yield from zip(one.split(rows), other.split(rows), strict=True)
