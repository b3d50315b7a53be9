"""The transport of a sync from several ranks, on the rank that drives: its own, and those of the other ranks."""

from collections.abc import Sequence
from typing import Any

from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.transports import Chunk, Descriptor, Transport
from r3.weight_sync.transports.from_ranks import NAME, ids_of, joint_id
from r3.weight_sync.transports.transport import Stop


class RanksTransport(Transport):
    """What is called here, the other ranks do with their own transports.

    Args:
        own: of this rank.
        orders: to the other ranks.
        senders: numbers of the ranks that send, in the order in which workers receive: all, or this one.
    """

    name = NAME

    def __init__(self, own: Transport, orders: Orders, senders: Sequence[int]) -> None:
        self._own = own
        self._orders = orders
        self._senders = list(senders)
        self._mine = orders.number
        self._published: set[int] = set()
        self.max_staged_chunks = own.max_staged_chunks
        self.timeout_s = own.timeout_s

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("zero_copy_names", "worker_gpus", "timeout_s"):  # set by the session
            setattr(self._own, name, value)

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        offers = self._offers(workers, connection_ids)
        joint = joint_id([offer.get("connection_id") for offer in offers])
        if connection_ids not in ({joint}, {None}):
            # Workers keep the connections to all ranks or to none.
            offers = self._offers(workers, {None})
            joint = joint_id([offer.get("connection_id") for offer in offers])
        self._orders.tell("join")
        return {"transport": self.name, "connection_id": joint, "offers": offers}

    def join(self, stop: Stop) -> None:
        self._own.join(stop)

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        mine = self._own.publish(index, chunk) if chunk else None
        if mine is not None:
            self._published.add(index)
        where = {number: answer["where"] for number, answer in self._orders.answers().items()} | {self._mine: mine}
        parts = [[at, where[number]] for at, number in enumerate(self._senders) if where[number] is not None]
        return {"parts": parts}

    def takes_memory(self, chunk: Chunk) -> bool:
        return len(self._senders) > 1 or self._own.takes_memory(chunk)

    def transfer(self, index: int, stop: Stop) -> None:
        self._orders.tell("transfer", index=index)
        if index in self._published:
            self._own.transfer(index, stop)

    def release(self, index: int) -> None:
        self._orders.tell("release", index=index)
        self._own.release(index)

    def flush(self, stop: Stop) -> None:
        self._own.flush(stop)

    def abort(self) -> None:
        self._own.abort()

    def close(self) -> None:
        self.abort()  # it is of one sync; connections last

    def _offers(self, workers: int, connection_ids: set[str | None]) -> list[Descriptor]:
        """Of all senders, in their order."""
        ids = {number: ids_of(connection_ids, at, len(self._senders)) for at, number in enumerate(self._senders)}
        known = {str(number): list(of) for number, of in ids.items()}
        self._orders.tell("offer", workers=workers, connection_ids=known)
        mine = self._own.offer(workers, ids[self._mine])
        offers = {number: answer["offer"] for number, answer in self._orders.answers().items()} | {self._mine: mine}
        return [offers[number] for number in self._senders]
