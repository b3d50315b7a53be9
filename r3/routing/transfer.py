"""Prefetching of batches to a GPU during the computation on the previous one."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol, TypeVar

import torch


class Movable(Protocol):
    """A type that can be prefetched: a tensor, a `RolloutRouting`, a batch of both."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Any: ...

    def pin_memory(self) -> Any: ...


Batch = TypeVar("Batch", bound=Movable)


def prefetch(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Each of `batches` on `device`. On a GPU the next batch is copied during the computation on the current one.

    The copy starts from page-locked memory; the host first copies batches from other memory there. A batch is for the
    stream that is current when it is asked for. Up to three are on the GPU: the current one, the next one and, as long
    as the caller's loop variable holds it, the one before.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, non_blocking=False)
        return
    copying = _copy_stream(torch.cuda.current_device() if device.index is None else device.index)
    moved = None
    for batch in batches:
        pinned = batch.pin_memory()
        # The copy may reuse memory of an earlier batch, so it waits for all work queued on that batch. Work that the
        # caller queues from now on, for the current batch, runs in parallel.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            following = pinned.to(device, non_blocking=True)
        if moved is not None:
            yield moved
        torch.cuda.current_stream(device).wait_stream(copying)
        moved = following
    if moved is not None:
        yield moved


@cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    """One stream for all loops: the allocator separates memory by stream, and would keep some for each loop."""
    return torch.cuda.Stream(device)
