"""Progress of a sync: what has been sent so far."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from r3.weight_sync.engines import Engine
from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.sender.calls import ParallelCalls
from r3.weight_sync.timing import StageTimer
from r3.weight_sync.transports import Announced, Chunk

_AHEAD = 64  # tensors: with fewer, each takes the host up to three times as long


class StagedChunk(NamedTuple):
    """A chunk that is published and that no worker has been asked to load yet."""

    chunk: Chunk
    announced: Announced
    takes_memory: bool


@dataclass
class SyncProgress:
    """What one sync has sent, and what it took.

    Attributes:
        clock: the trainer's seconds by stage.
        digests: of the tensors sent; on a GPU they run on a stream of their own.
        named: digest of each tensor, complete at the end of the sync.
        not_finite: tensors with NaN or infinity that other ranks have sent.
        chunks: number of chunks handed to the transport.
        loading: number of the first chunk of the last call.
        bytes, sent_bytes: size of the tensors, and of what the transport was given.
        served: the engines that were serving before they were paused.
        committing: whether workers may have committed.
        worker_stages_s: the slowest worker's seconds by stage.
    """

    clock: StageTimer = field(default_factory=StageTimer)
    digests: ContentDigests = field(default_factory=lambda: ContentDigests(beside=True))
    named: dict[str, int] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    chunks: int = 0
    loading: int = 0
    bytes: int = 0
    sent_bytes: int = 0
    served: list[Engine] = field(default_factory=list)
    committing: bool = False
    worker_stages_s: dict[str, float] = field(default_factory=dict)

    def add(self, tensors: Chunk) -> None:
        """Compute digests of those of `tensors` that have none yet."""
        new = self._unread(tensors)
        self.digests.add(new)
        self.bytes += sum(tensor.nbytes for _, tensor in new)

    def digest_while(self, calls: list[ParallelCalls], resident: Iterator[tuple[str, Tensor]]) -> None:
        """Compute digests of `resident` tensors on the GPU while the host waits for `calls`."""
        while not all(call.done() for call in calls) and (batch := list(islice(resident, _AHEAD))):
            self.add(batch)
            time.sleep(0)  # let the threads of the calls run

    def require_readable(self, tensors: Chunk) -> None:
        """Raise `SyncError` if `add` would refuse one of `tensors`."""
        self.digests.require_readable(self._unread(tensors))

    def _unread(self, tensors: Chunk) -> Chunk:
        """Those of `tensors` that have no digest yet."""
        return [(name, tensor) for name, tensor in tensors if name not in self.digests]
