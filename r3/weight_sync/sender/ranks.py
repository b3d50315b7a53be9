"""A sync from all trainer ranks: one drives it, and each sends its part.

    drives = WeightSync(engine, transport="gloo").push(weights, version=1, ranks=ranks)   # one rank
    ranks.take_part(weights)                                                             # all others, at the same time

The rank that drives tells the others what to do next, and they do it in that order (`Orders`): it plans each round,
calls the engines, and alone decides. Whatever fails on any rank, all of them have gathered the same weights by then,
and get the same error.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed as dist

from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.sender.rank_link import Link, Message, links
from r3.weight_sync.sender.rank_part import RankPart
from r3.weight_sync.transports import TRANSPORTS, Transport
from r3.weight_sync.weights.lazy import Weight


class SyncRanks:
    """The ranks of a trainer that sync together. Every rank makes one, once, and uses it in every sync.

    Args:
        group: the ranks; None for all. Parameters are sharded over them, or over some of their replicas.
        timeout_s: longest wait for the others to come to a sync. Within it, the sync's own `timeout_s` holds.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float = 600.0) -> None:
        self._group = group
        self.timeout_s = timeout_s
        self.number = dist.get_rank(group)
        self.owners: list[int] = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._links: dict[int, Link] | None = None
        self._syncs = 0
        self._transport: tuple[Message, Transport] | None = None  # of this rank, where another one drives

    @property
    def size(self) -> int:
        return len(self.owners)

    @contextlib.contextmanager
    def driving(self, recipe: Message | None, timeout_s: float) -> Iterator[Orders]:
        """Context of a sync that this rank drives. What it raises, the other ranks raise too.

        Args:
            recipe: of this rank's transport, whose `host` the other ranks reach it by; None for ranks of one machine.
            timeout_s: of the sync.
        """
        orders = Orders(
            self.number,
            self.owners,
            self._next("127.0.0.1" if recipe is None else recipe["host"]),
            self._syncs,
            timeout_s,
            self.timeout_s,
        )
        try:
            yield orders
        except BaseException as error:
            orders.end(error)
            raise
        orders.end(None)

    def take_part(self, named_tensors: Iterable[tuple[str, Weight]], *, frozen: Sequence[str] = ()) -> None:
        """Gather and send this rank's part in the sync that another rank pushes. Returns when that has committed.

        Args:
            named_tensors: what the other rank pushes: the same weights in the same order.
            frozen: as the other rank has it.

        Raises:
            SyncError: it did not commit; says which rank or worker, and why. The same on every rank.
            EngineLostError: as `WeightSync.push` raises it: all ranks push again.
        """
        (link,) = self._next(None).values()
        try:
            part = RankPart(self.number, self.owners, link, self._syncs, self.timeout_s, self._transport_of)
            part.run(named_tensors, frozen)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.close()  # interrupted: the rank that drives sees it at once
            raise

    def close(self) -> None:
        """Close the connections, with the other ranks' and the workers'."""
        for link in (self._links or {}).values():
            link.close()
        if self._transport is not None:
            self._transport[1].close()
            self._transport = None

    def _transport_of(self, recipe: Message, timeout_s: float) -> Transport:
        """This rank's transport, kept from sync to sync."""
        if self._transport is None or self._transport[0] != recipe:
            if self._transport is not None:
                self._transport[1].close()
            self._transport = (recipe, TRANSPORTS[recipe["transport"]].of_recipe(recipe, self.number))
        self._transport[1].timeout_s = timeout_s
        return self._transport[1]

    def _next(self, host: str | None) -> dict[int, Link]:
        if self._links is None:
            self._links = links(self._group, host, self.timeout_s)
        self._syncs += 1
        return self._links
