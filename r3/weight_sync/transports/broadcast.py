"""One broadcast to all workers of all engines: gloo for CPU, NCCL for GPUs.

Trainer and workers form a separate group, in which rank 0 is the trainer. It is kept from sync to sync while all
members still have it. Otherwise, after a failure or when a worker was restarted, a new one is made.
"""

import ipaddress
import socket
import uuid
from collections.abc import Callable
from typing import ClassVar

import torch

from r3.errors import SyncError
from r3.weight_sync.transports.framing import PackedBlock, pack, unpack
from r3.weight_sync.transports.group import GlooGroup, Group, local_address
from r3.weight_sync.transports.nccl import NcclGroup
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver, Stop, Transport

_ANY_PORT = 9  # to look up a route: nothing is sent
_MOST_RECEIVED = 2
"""Chunks whose memory a worker may hold at a time."""


class BroadcastTransport(Transport):
    """The trainer's side.

    Args:
        host: address of this machine by which the workers reach it. The default serves engines on the same machine.
        port: that they meet at; 0 for any that is free. In a sync from all ranks each takes one, from this on. Then the
            members connect to each other at ports that gloo or NCCL chooses (NCCL's by its variables, gloo's out of the
            system's range for such).
        device: from where to send. By default the CPU for gloo, the current GPU for NCCL.
    """

    group: ClassVar[type[Group]]

    def __init__(self, host: str = "127.0.0.1", port: int = 0, device: torch.device | str | None = None) -> None:
        self._host = host
        self._port = port
        self._device = torch.device(device) if device is not None else self._default_device()
        self._group: Group | None = None
        self._listener: socket.socket | None = None
        self._offer: Descriptor = {}
        self._blocks: dict[int, list[PackedBlock]] = {}

    @staticmethod
    def _default_device() -> torch.device:
        return torch.device("cpu")

    def recipe(self) -> Descriptor:
        return {"transport": self.name, "host": self._host, "port": self._port, "machine": socket.gethostname()}

    @classmethod
    def of_recipe(cls, recipe: Descriptor, sender: int) -> "BroadcastTransport":
        host = local_address(recipe["host"], recipe["port"] or _ANY_PORT)
        if recipe["machine"] != socket.gethostname() and ipaddress.ip_address(host).is_loopback:
            raise SyncError(
                f"{cls.name}: rank 0 is reached by {recipe['host']} on {recipe['machine']} alone, and this rank is on "
                f"{socket.gethostname()}: give `host=` of the transport, or weight_sync.host, an address of the network"
            )
        return cls(host=host, port=recipe["port"] + sender if recipe["port"] else 0)

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        kept = (
            self._group is not None
            and connection_ids == {self._group.connection_id}
            and self._group.size == workers + 1
        )
        if not kept:
            self.abort()
            # The port is bound here, and listened on from now on, so that no worker connects too early.
            self._listener = self._listening()
            self._offer = {
                "transport": self.name,
                "connection_id": uuid.uuid4().hex,
                "host": self._host,
                "port": self._listener.getsockname()[1],
                "size": workers + 1,
            }
        return self._offer

    def _listening(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self._port), family=family)
        except OSError as error:
            raise SyncError(
                f"{self.name}: expected an address of this machine and a free port, by which workers reach it, got "
                f"{self._host}:{self._port}: {error}"
            ) from error

    def join(self, stop: Stop) -> None:
        if self._group is None:
            self._group = self.group(self._offer, 0, self._device, self.timeout_s, self._listener)

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        # Staged chunks and those in flight together: one more than may be staged, since workers answer while they still
        # receive.
        if self._group is not None:
            self._group.flush_all_but(self.max_staged_chunks - len(self._blocks), lambda: False)
        self._blocks[index] = pack(chunk, self._device)
        return {"blocks": [[block.data.numel(), block.layout] for block in self._blocks[index]]}

    def transfer(self, index: int, stop: Stop) -> None:
        group = self._joined()
        group.broadcast([block.data for block in self._blocks.pop(index)])
        if self._device.type == "cpu":
            group.flush_all_but(0, stop)

    def flush(self, stop: Stop) -> None:
        self._joined().flush_all_but(0, stop)

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

    def _joined(self) -> Group:
        if self._group is None:
            raise SyncError(f"{self.name}: nobody has joined; call offer and join first")
        return self._group


class BroadcastReceiver(Receiver):
    group: ClassVar[type[Group]]

    def __init__(self, offer: Descriptor, rank: int, device: torch.device, timeout_s: float) -> None:
        super().__init__(offer, rank, device, timeout_s)
        self.connection_id = offer["connection_id"]
        self._group = self.group(offer, rank + 1, self._buffers_on(), timeout_s)

    def receiving(self, where: Descriptor) -> Callable[[], Chunk]:
        self._group.flush_all_but(_MOST_RECEIVED - 1, lambda: False)
        device = self._buffers_on()
        data = self._group.receive([nbytes for nbytes, _ in where["blocks"]])

        def received() -> Chunk:
            if device.type == "cpu":
                self._group.flush_all_but(0, lambda: False)
            tensors = [
                item for block, (_, layout) in zip(data, where["blocks"], strict=True) for item in unpack(block, layout)
            ]
            return tensors if device == self.device else [(name, tensor.to(self.device)) for name, tensor in tensors]

        return received

    def receive(self, where: Descriptor) -> Chunk:
        return self.receiving(where)()

    def wait(self) -> None:
        self._group.flush_all_but(0, lambda: False)

    def abort(self) -> None:
        self._group.abort()

    def _buffers_on(self) -> torch.device:
        return self.device


class GlooTransport(BroadcastTransport):
    """Over TCP, from and into main memory."""

    name = "gloo"
    group = GlooGroup


class GlooReceiver(BroadcastReceiver):
    group = GlooGroup

    def _buffers_on(self) -> torch.device:
        return torch.device("cpu")


class NcclTransport(BroadcastTransport):
    """Between GPUs. Trainer and workers must be on different GPUs: for one and the same there is `ipc`."""

    name = "nccl"
    max_staged_chunks = 2
    group = NcclGroup

    @staticmethod
    def _default_device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())


class NcclReceiver(BroadcastReceiver):
    group = NcclGroup
