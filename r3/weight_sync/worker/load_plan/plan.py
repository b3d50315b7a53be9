"""A load plan: which region of which checkpoint tensor goes to which region of which of the engine's tensors.

vLLM's loaders cut a fused expert tensor into hundreds of small copies, each through Python. If they only copy, and the
weights are not processed afterwards, a few large copies give the same bits. The copies are recorded and proved in the
first sync (`load_plan.trace`); this module has the plan, its compression and its use.

All offsets and strides are in elements. Sources are contiguous; targets have the layout that was proved.
"""

import math
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from r3.weight_sync.protocol import Manifest
from r3.weight_sync.transports import Chunk

TensorLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, stride

# One kernel copies many small tensors; a large one alone is faster by the device's own copy.
SMALL_BYTES = 1 << 20
# A layout of more pieces than this gains nothing from a plan, and is slow to check.
MOST_RUNS = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Region:
    """Part of a tensor, in elements of its storage from its first element on."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """The region as a view of `tensor`."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A strided copy from a source tensor to tensor `tensor` of layer `layer`."""

    layer: str
    tensor: str
    size: tuple[int, ...]
    source_stride: tuple[int, ...]
    target_stride: tuple[int, ...]
    source_offset: int
    target_offset: int

    @property
    def source(self) -> Region:
        return Region(size=self.size, stride=self.source_stride, offset=self.source_offset)

    @property
    def target(self) -> Region:
        return Region(size=self.size, stride=self.target_stride, offset=self.target_offset)


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A region that the loaders set to a constant: the rows that pad a vocabulary."""

    tensor: str
    region: Region
    value: float


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A layer whose weights are as its sources have them."""

    layout: dict[str, TensorLayout]  # by tensor
    elements: int  # that come from sources
    fills: tuple[Fill, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """The plan that one worker learned in a complete sync of `manifest`. It is of no use to another worker.

    A source is planned (in `copies`), dropped (vLLM takes no part of it on this worker) or slow (all others: vLLM's
    loaders must see it). A layer in `layers` is fed by planned sources alone, one in `slow` by slow ones alone.
    """

    manifest: Manifest
    copies: dict[str, tuple[Copy, ...]]
    dropped: frozenset[str]
    layers: dict[str, LayerPlan]
    slow: dict[str, str]  # layer -> class and reason
    ties: frozenset[tuple[str, ...]] = frozenset()  # sources that go into the same memory
    kept: frozenset[str] = frozenset()  # layers that got nothing on purpose

    def serves(self, manifest: Manifest) -> bool:
        """Whether the plan knows every tensor of `manifest`."""
        return all(self.manifest.get(name) == (tuple(shape), dtype) for name, (shape, dtype) in manifest.items())

    def is_of(self, manifest: Manifest, kept: frozenset[str] = frozenset()) -> bool:
        """Whether `manifest` has all of the plan's tensors and no others.

        Args:
            manifest: what will come.
            kept: layers that get nothing on purpose.
        """
        return self.manifest.keys() == manifest.keys() and self.kept == kept and self.serves(manifest)

    def covers(self, manifest: Manifest, kept: frozenset[str] = frozenset()) -> bool:
        """Whether the plan handles all of these tensors, so that vLLM's loaders are not needed."""
        return not self.slow_sources and self.is_of(manifest, kept)

    @cached_property
    def whole(self) -> dict[str, Copy]:
        """The copy of each tensor that goes unchanged, in one piece, into contiguous memory."""
        return {
            name: copies[0]
            for name, copies in self.copies.items()
            if len(copies) == 1
            and copies[0].size == (math.prod(self.manifest[name][0]),)
            and copies[0].source_stride == copies[0].target_stride == (1,)
        }

    @cached_property
    def slow_sources(self) -> set[str]:
        """Names of the tensors that go through vLLM's loaders."""
        return self.manifest.keys() - self.copies.keys() - self.dropped

    def describe(self) -> dict[str, object]:
        """Counts for logs and receipts: layers planned and slow (with reasons), sources, copies and bytes a sync."""
        copies = [copy for group in self.copies.values() for copy in group]
        sizes = {name: layer.layout for name, layer in self.layers.items()}
        return {
            "layers_planned": len(self.layers),
            "layers_slow": len(self.slow),
            "slow_reasons": dict(Counter(self.slow.values()).most_common()),
            "sources_planned": len(self.copies),
            "sources_slow": len(self.slow_sources),
            "sources_dropped": len(self.dropped),
            "copies": len(copies),
            "bytes_planned": sum(math.prod(c.size) * sizes[c.layer][c.tensor][2].itemsize for c in copies),
            "bytes_slow": sum(_nbytes(*self.manifest[name]) for name in self.slow_sources),
        }


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize


@dataclass(kw_only=True)
class Planned:
    """A plan in use: one sync's copies into the tensors that the engine computes with.

    Args:
        plan: what was learned.
        targets: layer -> tensor name -> tensor. They are written in place: CUDA graphs hold their addresses.
    """

    plan: LoadPlan
    targets: dict[str, dict[str, Tensor]]
    received: dict[str, int] = field(default_factory=dict)  # layer -> elements
    _seen: set[str] = field(default_factory=set)

    def mismatches(self) -> list[str]:
        """Layers that are no longer laid out as the plan has them."""
        problems = []
        for name, layer in self.plan.layers.items():
            held = {tensor: layout_of(t) for tensor, t in self.targets.get(name, {}).items()}
            if held != layer.layout:
                problems.append(f"{name}: expected {layer.layout}, got {held}")
        return problems

    def whole_targets(self, chunk: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Targets of the tensors of `chunk` that are copied whole: by name, contiguous, with as many elements."""
        copied_to = {}
        for name, source in chunk:
            copy = self.plan.whole.get(name)
            if copy is None or self.plan.manifest[name] != (tuple(source.shape), str(source.dtype)):
                continue
            target = self.targets[copy.layer][copy.tensor]
            if (target.dtype, target.device) == (source.dtype, source.device):
                all_of_it = copy.size == (target.numel(),) and target.is_contiguous()
                copied_to[name] = target if all_of_it else copy.target.of(target)
        return copied_to

    def take(self, chunk: Iterable[tuple[str, Tensor]], written: Container[str] = ()) -> Chunk:
        """Queue the planned copies on the current stream. Returns the tensors that must go through vLLM's loaders.

        Tensors in `written` are in their places already.
        """
        rest: Chunk = []
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, source in chunk:
            if self.plan.manifest.get(name) != (tuple(source.shape), str(source.dtype)):
                rest.append((name, source))
            elif copies := self.plan.copies.get(name):
                if name not in written:
                    flat = source.contiguous()
                    pairs += [(c.target.of(self.targets[c.layer][c.tensor]), c.source.of(flat)) for c in copies]
                if name not in self._seen:
                    self._seen.add(name)
                    for c in copies:
                        self.received[c.layer] = self.received.get(c.layer, 0) + math.prod(c.size)
            elif name not in self.plan.dropped:
                rest.append((name, source))
        _copy_all(pairs)
        return rest

    def fill(self) -> None:
        """Set the constants of every layer that received weights: an engine that slept may have lost them."""
        for layer in self.received:
            for fill in self.plan.layers[layer].fills:
                fill.region.of(self.targets[layer][fill.tensor]).fill_(fill.value)


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Run small copies between equal dtypes in one call per kind, and all others one by one."""
    groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        alike = target.device == source.device and target.is_contiguous() and source.is_contiguous()
        if alike and target.nbytes < SMALL_BYTES:
            targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)


def layout_of(tensor: Tensor) -> TensorLayout:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def coalesced(copies: Iterable[Copy]) -> list[Copy]:
    """The copies of one source merged into as few as possible: neighbours and even steps become dimensions of one copy.

    The experts' w1 and w3 of a fused `[E, 2I, H]` become one copy, also where a tensor-parallel rank takes a part.
    """
    merged = [_canonical(copy) for copy in copies]
    while True:
        before = len(merged)
        merged = _merge_steps(merged)
        if len(merged) == before:
            return merged


def _canonical(copy: Copy) -> Copy:
    """Dimensions sorted by descending target stride, without those of size 1, contiguous neighbours merged."""
    dims = [dim for dim in zip(copy.size, copy.target_stride, copy.source_stride, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: (-dim[1], -dim[2]))
    kept: list[tuple[int, int, int]] = []
    for size, target, source in dims:
        if kept and kept[-1][1] == target * size and kept[-1][2] == source * size:
            kept[-1] = (kept[-1][0] * size, target, source)
        else:
            kept.append((size, target, source))
    sizes, targets, sources = zip(*kept, strict=True) if kept else ((), (), ())
    return replace(copy, size=tuple(sizes), target_stride=tuple(targets), source_stride=tuple(sources))


def _merge_steps(copies: list[Copy]) -> list[Copy]:
    alike: dict[tuple, list[Copy]] = {}
    for copy in copies:
        alike.setdefault((copy.layer, copy.tensor, copy.size, copy.target_stride, copy.source_stride), []).append(copy)
    merged = []
    for group in alike.values():
        group.sort(key=lambda copy: copy.target_offset)
        start = 0
        while start < len(group):
            first, end = group[start], start + 1
            step = _step(first, group[end]) if end < len(group) else (0, 0)
            while end < len(group) and min(step) > 0 and _step(group[end - 1], group[end]) == step:
                end += 1
            if end - start > 1:
                first = _canonical(
                    replace(
                        first,
                        size=(end - start, *first.size),
                        target_stride=(step[0], *first.target_stride),
                        source_stride=(step[1], *first.source_stride),
                    )
                )
            merged.append(first)
            start = end
    return merged


def _step(one: Copy, other: Copy) -> tuple[int, int]:
    return other.target_offset - one.target_offset, other.source_offset - one.source_offset


def coverage_problem(regions: Iterable[Region], shape: tuple[int, ...], stride: tuple[int, ...]) -> str | None:
    """Why `regions` are not a partition of the elements of a tensor of this layout; None if they are."""
    regions = list(regions)
    total, numel = sum(region.numel for region in regions), math.prod(shape)
    if total == numel == 0:
        return None
    if 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) != numel:
        return "its memory has gaps"
    if total < numel:
        return f"{numel - total} of {numel} elements come from no checkpoint tensor"
    starts, lengths = [], []
    if sum(_runs(region) for region in regions) > MOST_RUNS:
        return f"it is loaded in more than {MOST_RUNS} pieces"
    for region in regions:
        offsets = torch.tensor([region.offset])
        dims = sorted(zip(region.stride, region.size, strict=True))
        length = dims.pop(0)[1] if dims and dims[0][0] == 1 else 1
        for step, n in dims:
            offsets = (offsets[:, None] + step * torch.arange(n)).flatten()
        starts.append(offsets)
        lengths.append(torch.full_like(offsets, length))
    start, order = torch.cat(starts).sort()
    end = start + torch.cat(lengths)[order]
    if bool((start[1:] < end[:-1]).any()) or start[0] < 0 or end[-1] > numel:
        return "some elements are loaded twice"
    return None


def _runs(region: Region) -> int:
    return region.numel // max((n for n, s in zip(region.size, region.stride, strict=True) if s == 1), default=1)
