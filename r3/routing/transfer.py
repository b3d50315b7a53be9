"""Batches on their way to a GPU while the one before is computed with."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch


class Movable(Protocol):
    """What can be prefetched: a tensor, a `RolloutRouting`, a batch of both."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Any: ...

    def pin_memory(self) -> Any: ...


Batch = TypeVar("Batch", bound=Movable)


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Each of `batches` on `device`; on a GPU the next one is copied beside the computation with the current one.

    The copy runs on a stream of its own, from page-locked memory. Two batches are on the device at a time.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, non_blocking=False)
        return
    copying = torch.cuda.Stream(device)
    moved = None
    for batch in batches:
        pinned = batch.pin_memory()
        # The copy goes to memory that an earlier batch may have had: it waits for what was computed with that. The
        # current batch's computation is queued afterwards, and runs beside it.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            following = pinned.to(device, non_blocking=True)
        if moved is not None:
            yield moved
        torch.cuda.current_stream(device).wait_stream(copying)
        moved = following
    if moved is not None:
        yield moved
