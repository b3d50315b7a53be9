"""The worker's side of a sync from several trainer ranks: a receiver for each rank that sends.

A chunk of such a sync is a round: the parts that the ranks send at the same time, each by a transport of its own. All
workers begin to receive them in the order of the ranks, and then wait for them in that order, so that no two wait for
each other.
"""

import torch

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver

NAME = "ranks"
_JOINT = "+"


class RanksReceiver(Receiver):
    """Receives from all ranks that send. They are joined one after the other, in their order.

    Args:
        offer: {"transport": "ranks", "offers": of each rank's transport}.
    """

    def __init__(self, offer: Descriptor, rank: int, device: torch.device, timeout_s: float) -> None:
        from r3.weight_sync.transports import RECEIVERS

        super().__init__(offer, rank, device, timeout_s)
        self._receivers: list[Receiver] = []
        try:
            for part in offer["offers"]:
                self._receivers.append(RECEIVERS[part["transport"]](part, rank, device, timeout_s))
        except Exception as error:
            self.abort()
            raise SyncError(f"sender {len(self._receivers)} of {len(offer['offers'])}: {error}") from error
        self.takes_memory = any(receiver.takes_memory for receiver in self._receivers)
        self.connection_id = joint_id([receiver.connection_id for receiver in self._receivers])

    def receive(self, where: Descriptor) -> Chunk:
        begun = [self._receivers[sender].receiving(part) for sender, part in where["parts"]]
        return [item for received in begun for item in received()]

    def wait(self) -> None:
        for receiver in self._receivers:
            receiver.wait()

    def release(self, index: int) -> None:
        for receiver in self._receivers:
            receiver.release(index)

    def flush(self) -> None:
        for receiver in self._receivers:
            receiver.flush()

    def abort(self) -> None:
        for receiver in self._receivers:
            receiver.abort()


def joint_id(ids: list[str | None]) -> str | None:
    """One connection id for those of all senders, unlike any of theirs; None if one keeps no connection."""
    return None if None in ids else _JOINT.join([NAME, *map(str, ids)])


def ids_of(joint: set[str | None], sender: int, senders: int) -> set[str | None]:
    """Of connections that workers hold, the ids of those to one sender; {None} where a worker has other ones."""
    parted = [(one or "").split(_JOINT) for one in joint]
    return {parts[1 + sender] if parts[0] == NAME and len(parts) == 1 + senders else None for parts in parted}
