"""A broadcast group of trainer and workers: rendezvous, and gloo's broadcasts."""

import contextlib
import socket
from abc import ABC, abstractmethod
from collections import deque
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Descriptor, Stop, wait_until


class Group(ABC):
    """Trainer and workers, connected. Every wait has a timeout.

    Args:
        offer: with host, port, size and connection_id.
        rank: of this process; 0 sends, and hosts the store by which the others find each other.
        device: where blocks are.
        timeout_s: longest wait for the others.
        listener: of rank 0, at the offered port.

    Raises:
        SyncError: a rank did not join in time.
    """

    def __init__(
        self,
        offer: Descriptor,
        rank: int,
        device: torch.device,
        timeout_s: float,
        listener: socket.socket | None = None,
    ) -> None:
        self.connection_id = offer["connection_id"]
        self.size = offer["size"]
        self._rank = rank
        self._device = device
        self._timeout_s = timeout_s
        self._in_flight: deque[Any] = deque()
        limit = timedelta(seconds=timeout_s)
        options: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
        try:
            store = dist.TCPStore(
                offer["host"], offer["port"], self.size, rank == 0, timeout=limit, wait_for_workers=False, **options
            )
            # Connecting may wait forever for ranks that do not come, so it begins when all are here.
            store.set(f"here/{rank}", "")
            store.wait([f"here/{other}" for other in range(self.size)], limit)
            self._connect(store, offer)
        except Exception as error:
            raise SyncError(
                f"rank {rank} of {self.size} (0 is the trainer) could not join the group at "
                f"{offer['host']}:{offer['port']} within {timeout_s:g} s: {error}\nIf the others run, a firewall may "
                "stand between: open the port that `port=` of the transport, or weight_sync.port, sets"
            ) from error

    @abstractmethod
    def _connect(self, store: dist.TCPStore, offer: Descriptor) -> None:
        """Connect to the other ranks, all of which are in this call."""

    @abstractmethod
    def broadcast(self, blocks: list[Tensor]) -> None:
        """Start to send uint8 `blocks` (rank 0). `blocks` are kept alive until a flush."""

    @abstractmethod
    def receive(self, sizes: list[int]) -> list[Tensor]:
        """Begin to receive blocks of `sizes` bytes. On a GPU it is queued, and the current stream waits for it; on the
        CPU they are there after a flush."""

    @abstractmethod
    def _done(self, under_way: Any) -> bool:
        """Whether one call of `broadcast` or `receive` has ended; raises if it has failed."""

    def flush_all_but(self, kept: int, stop: Stop) -> None:
        """Wait until at most `kept` calls of `broadcast` or `receive` are in flight."""
        while len(self._in_flight) > kept:
            done = partial(self._done, self._in_flight[0])
            wait_until(done, stop, self._timeout_s, f"broadcast among {self.size} ranks")
            self._in_flight.popleft()

    @abstractmethod
    def abort(self) -> None:
        """Take the group down, with whatever is in flight."""


class GlooGroup(Group):
    """In main memory, over TCP."""

    def _connect(self, store: dist.TCPStore, offer: Descriptor) -> None:
        options = dist.ProcessGroupGloo._Options()  # pyrefly: ignore (missing in torch's stubs)
        options._timeout = timedelta(seconds=self._timeout_s)
        # The interface by which this machine reaches the trainer, whatever its host name resolves to.
        address = local_address(offer["host"], offer["port"])
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._group: Any = dist.ProcessGroupGloo(store, self._rank, self.size, options)

    def broadcast(self, blocks: list[Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        works = [self._group.broadcast([block], options) for block in blocks if block.numel()]
        self._in_flight.append((works, blocks))

    def receive(self, sizes: list[int]) -> list[Tensor]:
        blocks = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.broadcast(blocks)
        return blocks

    def _done(self, under_way: Any) -> bool:
        works, _ = under_way
        if not all(work.is_completed() for work in works):
            return False
        for work in works:
            work.wait()  # raises what went wrong
        return True

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._group.abort()
        self._in_flight.clear()


def local_address(host: str, port: int) -> str:
    """The address of this machine by which `host` is reached, and reaches it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return probe.getsockname()[0]
