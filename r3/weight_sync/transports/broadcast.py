"""One broadcast to all workers of all engines: gloo for CPU, NCCL for GPUs.

Trainer and workers form a process group of their own, apart from every other that they have: rank 0 is the trainer. It
is kept from sync to sync while all members still have it, and made anew otherwise: after a failure, or when a worker
was restarted.
"""

import contextlib
import queue
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from r3.config import environment
from r3.errors import SyncError
from r3.weight_sync.transports.base import Chunk, Receiver, Stop, Transport, Where, wait_until
from r3.weight_sync.transports.packing import Block, pack, unpack

_ABORT_S = 10.0
_MOST_IN_FLIGHT = 2
"""Chunks whose memory a device may hold at a time, on either side."""


class BroadcastTransport(Transport):
    """The trainer's side.

    Args:
        host: address of this machine by which the workers reach it. The default serves engines on the same machine.
        device: from where to send. By default the CPU for gloo, the current GPU for NCCL.
    """

    backend: ClassVar[str]

    def __init__(self, host: str = "127.0.0.1", device: torch.device | str | None = None) -> None:
        self._host = host
        self._device = torch.device(device) if device is not None else self._default_device()
        self._group: Group | None = None
        self._listener: socket.socket | None = None
        self._offer: Where = {}
        self._blocks: dict[int, list[Block]] = {}

    @staticmethod
    def _default_device() -> torch.device:
        return torch.device("cpu")

    def offer(self, workers: int, generations: set[str | None]) -> Where:
        kept = self._group is not None and generations == {self._group.generation} and self._group.size == workers + 1
        if not kept:
            self.abort()
            # The port is taken here and listened at from here on, so that no worker comes too early.
            self._listener = socket.create_server((self._host, 0))
            self._offer = {
                "transport": self.name,
                "generation": uuid.uuid4().hex,
                "host": self._host,
                "port": self._listener.getsockname()[1],
                "size": workers + 1,
            }
        return self._offer

    def join(self, stop: Stop) -> None:
        if self._group is None:
            self._group = Group(self.backend, self._offer, 0, self._device, self.timeout_s, self._listener)

    def publish(self, index: int, chunk: Chunk) -> Where:
        if self._device.type == "cuda":
            self._joined().settle_all_but(_MOST_IN_FLIGHT - 1, lambda: False)
        self._blocks[index] = pack(chunk, self._device)
        return {"blocks": [[block.data.numel(), block.layout] for block in self._blocks[index]]}

    def transfer(self, index: int, stop: Stop) -> None:
        group = self._joined()
        group.broadcast([block.data for block in self._blocks[index]])
        if self._device.type == "cpu":
            group.settle_all_but(0, stop)

    def release(self, index: int) -> None:
        self._blocks.pop(index, None)

    def settle(self, stop: Stop) -> None:
        self._joined().settle_all_but(0, stop)

    def abort(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._blocks.clear()

    def close(self) -> None:
        self.abort()

    def _joined(self) -> "Group":
        if self._group is None:
            raise SyncError(f"{self.name}: nobody has joined; call offer and join first")
        return self._group


class BroadcastReceiver(Receiver):
    backend: ClassVar[str]

    def __init__(self, offer: Where, rank: int, device: torch.device, timeout_s: float) -> None:
        super().__init__(offer, rank, device, timeout_s)
        self.generation = offer["generation"]
        self._group = Group(self.backend, offer, rank + 1, self._buffers_on(), timeout_s)

    def receive(self, where: Where) -> Chunk:
        self._group.settle_all_but(_MOST_IN_FLIGHT - 1, lambda: False)
        device = self._buffers_on()
        data = self._group.receive([nbytes for nbytes, _ in where["blocks"]], device)
        tensors = [
            item for block, (_, layout) in zip(data, where["blocks"], strict=True) for item in unpack(block, layout)
        ]
        return tensors if device == self.device else [(name, tensor.to(self.device)) for name, tensor in tensors]

    def wait(self) -> None:
        self._group.settle_all_but(0, lambda: False)

    def abort(self) -> None:
        self._group.abort()

    def _buffers_on(self) -> torch.device:
        return self.device


class GlooTransport(BroadcastTransport):
    """Over TCP, from and into main memory."""

    name = backend = "gloo"


class GlooReceiver(BroadcastReceiver):
    backend = "gloo"

    def _buffers_on(self) -> torch.device:
        return torch.device("cpu")


class NcclTransport(BroadcastTransport):
    """Between GPUs. Trainer and workers must be on different GPUs: for one and the same there is `ipc`."""

    name = backend = "nccl"

    @staticmethod
    def _default_device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())


class NcclReceiver(BroadcastReceiver):
    backend = "nccl"


class Group:
    """A process group of trainer and workers, whose waits all end.

    Args:
        backend: "gloo" or "nccl".
        offer: with host, port, size and generation.
        rank: of this process; 0 hosts the store by which the others find each other.
        listener: of rank 0, at the offered port.
    """

    def __init__(
        self,
        backend: str,
        offer: Where,
        rank: int,
        device: torch.device,
        timeout_s: float,
        listener: socket.socket | None = None,
    ) -> None:
        self.generation = offer["generation"]
        self.size = offer["size"]
        self._device = device
        self._timeout_s = timeout_s
        self._in_flight: deque[_Broadcast] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        limit = timedelta(seconds=timeout_s)
        try:
            self._store = _store(offer, rank, limit, listener)
            # NCCL waits without end for ranks that do not come: it begins when all are there.
            self._store.set(f"here/{rank}", "")
            self._store.wait([f"here/{other}" for other in range(self.size)], limit)
            if backend == "nccl":
                self._group = _within(timeout_s, lambda: _nccl(self._store, rank, self.size, device))
            else:
                self._group = _gloo(self._store, rank, self.size, offer, limit)
        except Exception as error:
            raise SyncError(
                f"rank {rank} of {self.size} (0 is the trainer) could not join the {backend} group at "
                f"{offer['host']}:{offer['port']} within {timeout_s:g} s: {error}"
            ) from error

    def broadcast(self, blocks: list[Tensor]) -> None:
        """Send (rank 0). On a GPU it is queued; `blocks` must live until it is settled."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._run(blocks)

    def receive(self, sizes: list[int], device: torch.device) -> list[Tensor]:
        """Receive blocks of `sizes` bytes. On a GPU it is queued, and the current stream waits for it."""
        if self._stream is None:
            blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
            self._run(blocks)
            self.settle_all_but(0, lambda: False)
            return blocks
        current = torch.cuda.current_stream(device)
        # Memory of the receiving stream, so that it need not wait for what the current one still loads.
        with torch.cuda.stream(self._stream):
            blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        self._run(blocks)
        for block in blocks:
            block.record_stream(current)
        current.wait_stream(self._stream)
        return blocks

    def _run(self, blocks: list[Tensor]) -> None:
        if self._stream is None:
            started = self._launch(blocks)
        else:
            # NCCL may hold the thread that launches, where a peer has stopped.
            started = _within(self._timeout_s, lambda: self._launch_on_stream(blocks))
        self._in_flight.append(started)

    def _launch(self, blocks: list[Tensor]) -> "_Broadcast":
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return _Broadcast(blocks, [self._group.broadcast([block], options) for block in blocks if block.numel()])

    def _launch_on_stream(self, blocks: list[Tensor]) -> "_Broadcast":
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            started = self._launch(blocks)
            for work in started.works:
                work.wait()  # for the stream alone
            started.behind = torch.cuda.Event()
            started.behind.record()
        return started

    def settle_all_but(self, kept: int, stop: Stop) -> None:
        """Wait until at most `kept` calls of `broadcast` or `receive` are under way."""
        while len(self._in_flight) > kept:
            wait_until(self._in_flight[0].done, stop, self._timeout_s, f"broadcast among {self.size} ranks")
            self._in_flight.popleft()

    def abort(self) -> None:
        """Take the group down, with whatever is under way in it."""
        with contextlib.suppress(Exception):
            _within(_ABORT_S, self._group.abort)
        self._in_flight.clear()


@dataclass
class _Broadcast:
    """A chunk under way.

    Attributes:
        blocks: its memory, which must live until it is done.
        works: torch's handles.
        behind: on a GPU, an event behind all of it in the group's stream.
    """

    blocks: list[Tensor]
    works: list[Any]
    behind: torch.cuda.Event | None = None

    def done(self) -> bool:
        """Raises what went wrong."""
        if self.behind is not None and self.behind.query():
            return True
        if not all(work.is_completed() for work in self.works):
            return False
        if self.behind is None:
            for work in self.works:
                work.wait()  # raises, and does not wait
            return True
        # To torch a broadcast that NCCL gave up is complete, while its kernel waits on for the peer, and for ever.
        for failure in filter(None, (work.exception() for work in self.works)):
            raise SyncError(" ".join(str(failure).partition("Exception raised from")[0].split()))
        return self.behind.query()


def _store(offer: Where, rank: int, limit: timedelta, listener: socket.socket | None) -> dist.TCPStore:
    options: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
    return dist.TCPStore(
        offer["host"], offer["port"], offer["size"], rank == 0, timeout=limit, wait_for_workers=False, **options
    )


def _nccl(store: dist.TCPStore, rank: int, size: int, device: torch.device) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # Time is kept here: torch's watchdog and its monitor would end the process, an engine's worker, where a sync
    # should fail.
    options._timeout = timedelta(days=365)
    no_watchdog = {
        "ASYNC_ERROR_HANDLING": "0",
        "ENABLE_MONITORING": "0",
        "DUMP_ON_TIMEOUT": "0",
        "PROPAGATE_ERROR": "0",
    }
    settings = {f"TORCH_NCCL_{name}": off for name, off in no_watchdog.items()}
    # All connections at once, here, where the time is kept, and not in the first collectives.
    with environment(**settings, NCCL_RUNTIME_CONNECT="0"), torch.cuda.device(device):
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(device)
    return group


def _within(timeout_s: float, make: Callable[[], Any]) -> Any:
    """What `make` returns; it is left behind in a thread if it does not return in time."""
    done: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            done.put((make(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        made, error = done.get(timeout=timeout_s)
    except queue.Empty:
        raise SyncError("a rank came and then did not take part") from None
    if error is not None:
        raise error
    return made


def _gloo(store: Any, rank: int, size: int, offer: Where, limit: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # pyrefly: ignore (missing in torch's stubs)
    options._timeout = limit
    # The interface by which this machine reaches the trainer, whatever its host name resolves to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_address_towards(offer["host"], offer["port"]))]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _address_towards(host: str, port: int) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return probe.getsockname()[0]
