"""Builds a load plan from the trace of a complete sync: which layers are proved, and which tensors feed only those."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn

from r3.weight_sync.worker.load_plan.layer_record import Comparison, Record
from r3.weight_sync.worker.load_plan.plan import Copy, LayerPlan, LoadPlan, Manifest, coverage_problem, layout_of

logger = logging.getLogger(__name__)

Fail = Callable[[str, str], None]  # layer, reason


def build_plan(
    model: nn.Module,
    manifest: Manifest,
    records: dict[str, Record],
    checks: Iterable[Comparison],
    *,
    links: Collection[tuple[str, str]],
    shared: Iterable[Collection[tuple[str, str]]],
    optional: Collection[str],
    slow_sources: set[str],
) -> LoadPlan:
    """Build the plan. Waits for the device, once.

    Args:
        model: whose layers they are.
        manifest: all tensors of the sync.
        records: by layer, of all layers that received weights.
        checks: queued comparisons.
        links: (source, layer) of every copy, also of those left out of the records.
        shared: groups of (layer, tensor) that are the same memory.
        optional: names of tensors that keep their values, on every path, if nothing is loaded into them.
        slow_sources: tensors of which something was computed, or that went where it cannot be said.
    """
    slow = {name: f"{record.kind}: {record.reason}" for name, record in records.items() if record.reason}

    def fail(layer: str, reason: str) -> None:
        slow.setdefault(layer, f"{type(model.get_submodule(layer)).__name__}: {reason}")

    _evaluate(checks, fail)
    uncovered = _uncovered(model, records, optional, fail)
    shared = [*shared]
    for group in shared:
        layers = {layer for layer, tensor in group if layer in records and records[layer].regions(tensor)}
        for layer in layers if len(layers) > 1 else ():
            fail(layer, "several layers load the same memory")

    linked = {source for source, _ in links}
    slow_sources = set(slow_sources)
    while split := [(s, layer) for s, layer in links if (s in slow_sources) != (layer in slow)]:
        for source, layer in split:
            slow_sources.add(source)
            fail(layer, "it shares a checkpoint tensor with something that vLLM must load")

    copies: dict[str, tuple[Copy, ...]] = {}
    proved = [record for name, record in records.items() if name not in slow]
    for record in proved:
        for source, group in record.copies.items():
            copies[source] = copies.get(source, ()) + tuple(group)
    plan = LoadPlan(
        manifest=dict(manifest),
        copies=copies,
        # A tensor that no layer took may have arrived too late for a layer that vLLM closed early: then order matters.
        dropped=frozenset() if uncovered else frozenset(manifest.keys() - linked - slow_sources),
        layers={record.layer: _layer_plan(record) for record in proved},
        slow=slow,
        ties=frozenset(_ties(records, shared)),
    )
    logger.info("Load plan learned: %s", plan.describe())
    return plan


def _ties(records: dict[str, Record], shared: Iterable[Collection[tuple[str, str]]]) -> Iterator[tuple[str, ...]]:
    """Sources whose elements several layers load into the same tensor."""
    for group in shared:
        sources: dict[tuple[int, tuple[int, ...]], set[str]] = {}
        for layer, tensor in group:
            for source, copies in records[layer].copies.items() if layer in records else ():
                for copy in copies:
                    if copy.tensor == tensor:
                        start = copy.target_offset + int(records[layer].kernel[tensor].storage_offset())
                        sources.setdefault((start, copy.size), set()).add(source)
        yield from (tuple(sorted(names)) for names in sources.values() if len(names) > 1)


def _evaluate(checks: Iterable[Comparison], fail: Fail) -> None:
    by_device: dict[torch.device, list[Comparison]] = {}
    for check in checks:
        by_device.setdefault(check[2].device, []).append(check)
    for group in by_device.values():
        for (layer, reason, _), bad in zip(group, torch.stack([flag for *_, flag in group]).tolist(), strict=True):
            if bad:
                fail(layer, reason)


def _uncovered(model: nn.Module, records: dict[str, Record], optional: Collection[str], fail: Fail) -> bool:
    """Whether there are elements that were not loaded exactly once."""
    any_uncovered = False
    for name, record in records.items():
        # Buffers that nothing is loaded into are the layer's own: rotary tables.
        may_lack = model.get_submodule(name)._buffers.keys() | set(optional)
        for tensor, (shape, stride, _) in record.layouts.items():
            regions = record.regions(tensor)
            if not regions and tensor in may_lack:
                continue
            if problem := coverage_problem(regions, shape, stride):
                any_uncovered = True
                fail(name, problem)
    return any_uncovered


def _layer_plan(record: Record) -> LayerPlan:
    return LayerPlan(
        layout={tensor: layout_of(kernel) for tensor, kernel in record.kernel.items()},
        elements=sum(copy.source.numel for group in record.copies.values() for copy in group),
        fills=tuple(record.fills),
    )
