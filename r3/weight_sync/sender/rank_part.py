"""The part of a rank in a sync that another one drives: it carries out that one's orders."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from r3.errors import EngineLostError, SyncError
from r3.weight_sync.engines.deadline import in_thread
from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.sender.chunking import OutgoingWeights, Parts
from r3.weight_sync.sender.orders import fingerprint
from r3.weight_sync.sender.rank_link import Link, Message
from r3.weight_sync.transports import Chunk, Transport
from r3.weight_sync.weights.gathering import Gathering
from r3.weight_sync.weights.lazy import Weight

logger = logging.getLogger("r3")


class RankPart:
    """What a rank does in a sync that another one drives.

    Args:
        number: of this rank.
        owners: global ranks, by number.
        link: to the rank that drives.
        sync: number of the sync, the same on all ranks.
        entry_timeout_s: longest wait for the rank that drives to come to the sync.
        transport_of: makes this rank's transport by a recipe and a timeout.
    """

    def __init__(
        self,
        number: int,
        owners: Sequence[int],
        link: Link,
        sync: int,
        entry_timeout_s: float,
        transport_of: Callable[[Message, float], Transport],
    ) -> None:
        self._number = number
        self._owners = owners
        self._link = link
        self._sync = sync
        self._timeout_s = entry_timeout_s
        self._transport_of = transport_of
        self._problem: str | None = None
        self._digests = ContentDigests(beside=True)
        self._transport: Transport | None = None
        self._joining: Future | None = None
        self._published: dict[int, Chunk] = {}
        self._rounds = self._bytes = 0
        self._has_committed = False
        self._owed: list[Parts] = []
        self._orders: dict[str, Callable[..., None]] = {
            "begin": self._begin,
            "offer": self._offer,
            "join": self._join,
            "gather": self._gather,
            "transfer": self._transfer,
            "release": self._release,
            "flush": self._flush,
            "committed": self._committed,
        }

    def run(self, named_tensors: Iterable[tuple[str, Weight]], frozen: Sequence[str]) -> None:
        weights: list[tuple[str, Weight]] = []
        with self._noting():
            weights = list(named_tensors)
        self._weights, self._frozen = weights, frozen
        said = ""
        with self._noting():
            said = fingerprint(weights, frozen)
        self._answer(weights=said)
        try:
            while (order := self._order()).pop("do") != "end":
                self._orders[self._asked](**order)
        except BaseException:
            self._give_up()
            raise
        if order["error"] is None:
            return
        self._give_up()
        raise (EngineLostError if order["lost"] else SyncError)(order["error"])

    def _order(self) -> Message:
        until = time.monotonic() + self._timeout_s
        # A rank that stood still first takes what has come meanwhile.
        while (message := self._link.receive(max(0.0, until - time.monotonic()))) is not None:
            if message["sync"] < self._sync:  # this rank has given it up
                if message["do"] == "gather":
                    self._owed.append(message["parts"])
                continue
            self._asked = message["do"]
            if self._asked != "beat":
                return {name: value for name, value in message.items() if name != "sync"}
            until = time.monotonic() + self._timeout_s
        if self._has_committed and self._link.delivered():  # the other one has the answer, if it goes on
            logger.warning("rank %s, which drove the sync, has committed it, and is silent since", self._link.rank)
            return {"do": "end", "error": None}
        with contextlib.suppress(SyncError):
            self._link.send({"sync": self._sync, "error": "has given up to wait"}, 1.0)
        raise SyncError(
            f"rank {self._link.rank}, which drives the sync, has said nothing for {self._timeout_s:g} s: it does not "
            "push, stands still, or cannot be reached"
        )

    def _begin(self, timeout_s: float, dtype: str | None, chunk_bytes: int, recipe: Message | None) -> None:
        self._timeout_s = timeout_s

        def outgoing(gathering: Gathering) -> OutgoingWeights:
            return OutgoingWeights(
                self._weights,
                dtype=None if dtype is None else getattr(torch, dtype),
                chunk_bytes=chunk_bytes,
                frozen=self._frozen,
                owners=self._owners,
                sender=self._number,
                gathering=gathering,
            )

        self._outgoing = outgoing(Gathering(timeout_s))
        # What the others have gathered since this rank gave up: each exchange takes all ranks, in one order.
        with self._noting():
            for parts in self._owed:
                outgoing(Gathering(timeout_s, waits=False)).gather(parts)
        if recipe is not None:
            with self._noting():
                self._transport = self._transport_of(recipe, timeout_s)
                self._transport.zero_copy_names = self._outgoing.zero_copy_names

    def _offer(self, workers: int, connection_ids: dict[str, list[str | None]]) -> None:
        offer = None
        with self._noting():
            if self._transport is not None:
                offer = self._transport.offer(workers, set(connection_ids[str(self._number)]))
                self._joining = None
        self._answer(offer=offer)

    def _join(self) -> None:
        if self._transport is not None and self._problem is None:
            transport = self._transport
            self._joining = in_thread(lambda: transport.join(lambda: False))

    def _gather(self, parts: Parts) -> None:
        index, where = self._rounds, None
        self._rounds += 1
        # After a problem too: in step with the others.
        with self._noting():
            chunk = self._outgoing.gather(parts).chunk
            if self._problem is None and chunk:
                assert self._transport is not None
                self._digests.require_readable(chunk)
                where = self._transport.publish(index, chunk)
                self._published[index] = chunk
        self._answer(where=where)

    def _transfer(self, index: int) -> None:
        if self._transport is None or self._problem is not None or index not in self._published:
            return
        with self._noting():
            if self._joining is not None:
                self._joining.result()
                self._joining = None
            self._transport.transfer(index, lambda: False)
            chunk = self._published.pop(index)
            self._digests.add(chunk)  # only now, while the workers load
            self._bytes += sum(tensor.nbytes for _, tensor in chunk)

    def _release(self, index: int) -> None:
        if self._transport is not None:
            self._transport.release(index)

    def _flush(self) -> None:
        digests: dict[str, int] = {}
        with self._noting():
            if self._transport is not None and self._joining is None and self._problem is None:
                self._transport.flush(lambda: False)
            digests = self._digests.result()
        self._answer(digests=digests, not_finite=self._digests.not_finite(), bytes=self._bytes)

    def _committed(self) -> None:
        self._has_committed = True
        self._answer()

    def _answer(self, **more: Any) -> None:
        self._link.send({"sync": self._sync, "error": self._problem, **more}, self._timeout_s)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """A problem ends no order: it is the next answer. The first one counts."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or f"{type(error).__name__}: {error}"

    def _give_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()
