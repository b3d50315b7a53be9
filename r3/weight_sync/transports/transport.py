"""The interface of a weight transport, which moves a chunk from the trainer to every worker of every engine.

A sync makes the same calls for all transports. The trainer's side (`Transport`) and the worker's (`Receiver`) share
nothing but plain dictionaries, which travel with the calls of the sync (so: strings, integers, lists; JSON is enough).

    trainer                                   each worker
    offer = transport.offer(...)
    call begin(offer)               ->        receiver = RECEIVERS[offer["transport"]](offer, rank, device, timeout_s)
    transport.join(stop)            <->       (joins meanwhile)
    where = transport.publish(i, chunk)       (of each staged chunk; of the first while the workers join)
    call load(i, [where, ...])      ->        chunk = receiver.receive(where), one after the other
    transport.transfer(i, stop)     <->       (receives meanwhile)
    transport.release(i)            <-        answer to a call with chunk i at its start, or to the seal
                                              (before which: receiver.release(i))
    transport.flush(stop)           <->       receiver.flush()

`join`, `transfer` and `flush` deadlock if one side comes and the other never does: they end at `timeout_s`, or as soon
as `stop()` is true, which says that a worker has answered and will not come. After any failure both sides abort, and
the next sync starts from an `offer` that knows nothing of this one.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from r3.errors import SyncError

Chunk = list[tuple[str, Tensor]]
Descriptor = dict[str, Any]
Announced = tuple[list[str], Descriptor]
"""A chunk as it goes with a call: the names of its tensors, and what `publish` answered."""
Stop = Callable[[], bool]

_SPIN_S = 0.3e-3


class Transport(ABC):
    """The trainer's side.

    Attributes:
        max_staged_chunks: how many chunks that take memory may be published while the workers load others. More save
            calls, each of which takes vLLM 1 to 2 ms.
        timeout_s: longest wait for the other side. Set by the session.
        zero_copy_names: tensors of the live model, which the trainer keeps; the others are made for the sync. Set by
            the session.
        worker_gpus: `gpu_uuid` of each worker's GPU. Set by the session.
    """

    name: ClassVar[str]
    max_staged_chunks: int = 1
    timeout_s: float = 600.0
    zero_copy_names: Container[str] = ()
    worker_gpus: Collection[str | None] = ()

    def recipe(self) -> Descriptor | None:
        """What other ranks need to send their parts by transports of this kind; None where only one rank can send."""
        return None

    @classmethod
    def of_recipe(cls, recipe: Descriptor, sender: int) -> "Transport":
        """This rank's transport, for the `recipe` of another one's.

        Args:
            sender: number of this rank among those that send.

        Raises:
            SyncError: the workers cannot reach this rank that way.
        """
        raise NotImplementedError

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        """The data that workers need to join: at least {"transport": name}.

        Args:
            workers: how many will join, of all engines.
            connection_ids: of the receivers that the workers still hold; {None} where there are none. A transport that
                keeps connections goes on with them only if all hold its own.
        """
        return {"transport": self.name}

    def join(self, stop: Stop) -> None:  # noqa: B027 (nothing to do for some)
        """Connect to the workers, which are in `begin` meanwhile."""

    @abstractmethod
    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        """Stage chunk number `index` for `receive`. It is kept until `release` is called with a later number."""

    def takes_memory(self, chunk: Chunk) -> bool:
        """Whether sending `chunk` takes memory on the trainer or a worker, besides what the trainer keeps anyway."""
        return True

    def transfer(self, index: int, stop: Stop) -> None:  # noqa: B027 (nothing to do for some)
        """Move the bytes, while the workers receive."""

    def release(self, index: int) -> None:  # noqa: B027 (nothing to do for some)
        """Free the chunks before number `index`: no worker needs them any more."""

    def flush(self, stop: Stop) -> None:  # noqa: B027 (nothing to do for some)
        """Wait until the device has sent all that was queued."""

    @abstractmethod
    def abort(self) -> None:
        """Drop the state of a failed sync. The transport can be used again."""

    @abstractmethod
    def close(self) -> None:
        """Release the transport's resources."""


class Receiver(ABC):
    """A worker's side.

    Args:
        offer: of the transport.
        rank: of this worker among all workers of all engines, from 0.
        device: where the model is.
        timeout_s: longest wait for the other side.

    Attributes:
        takes_memory: whether received chunks take the worker's memory; that bounds how many may wait for the device.
        connection_id: names the connection that this receiver keeps from sync to sync; None if it keeps none.
    """

    takes_memory: bool = True
    connection_id: str | None = None

    def __init__(self, offer: Descriptor, rank: int, device: torch.device, timeout_s: float) -> None:
        self.offer = offer
        self.rank = rank
        self.device = device
        self.timeout_s = timeout_s

    @abstractmethod
    def receive(self, where: Descriptor) -> Chunk:
        """The tensors of a chunk. Raises if it is not there or not whole."""

    def receiving(self, where: Descriptor) -> Callable[[], Chunk]:
        """Begin to receive a chunk. What this returns waits for it: several may be under way, of several receivers."""
        return partial(self.receive, where)

    def wait(self) -> None:  # noqa: B027 (nothing to do for some)
        """Wait, for `timeout_s` at most, until the device has received all that was queued."""

    def release(self, index: int) -> None:  # noqa: B027 (nothing to do for some)
        """Free the chunks before number `index`: the device has read them."""

    def flush(self) -> None:
        """End a sync that went well: `wait`, and free what the next sync does not need."""
        self.wait()

    def abort(self) -> None:  # noqa: B027
        """Drop the state of a failed sync."""


@cache
def gpu_uuid(device: torch.device) -> str | None:
    """UUID of the GPU, the same for processes that number their GPUs differently; None if it is no CUDA device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def wait_until(done: Callable[[], bool], stop: Stop, timeout_s: float, operation: str) -> None:
    """Wait for `done()`. Raises `SyncError` at the timeout, or once `stop()` is true and `done()` is not soon after."""
    start = time.monotonic()
    stopped: float | None = None
    while not done():
        now = time.monotonic()
        if stopped is None and stop():
            stopped = now
        # The other side's answer can overtake the last bytes.
        if stopped is not None and now - stopped > 1.0:
            raise SyncError(f"{operation}: the other side has answered and does not come")
        if now - start > timeout_s:
            raise SyncError(
                f"{operation}: not done within {timeout_s:g} s: the other side died, was stopped, or never came"
            )
        # A sleep takes 60 us at least: none at first, and later one of an eighth of the wait so far.
        time.sleep(min((now - start) / 8, 2e-3) if now - start > _SPIN_S else 0)
