"""What the rank that drives a sync has the other ranks do, and what they answer."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from r3.errors import EngineLostError, SyncError, summary
from r3.weight_sync.sender.chunking import OutgoingWeights, Parts, Round
from r3.weight_sync.sender.progress import SyncProgress
from r3.weight_sync.sender.rank_link import Link, Message, await_any
from r3.weight_sync.weights.gathering import Gathering
from r3.weight_sync.weights.lazy import Weight

_BEATS = 5  # in the time after which a rank that says nothing is given up
_LATE_S = 2.0  # ranks that fail together do not do so at the same moment


class Orders:
    """Of the rank that drives, in one sync. Every order is carried out by all other ranks, in the order given.

    Args:
        number: of this rank.
        owners: global ranks, by number.
        others: links to the other ranks.
        sync: number of the sync, the same on all ranks.
        timeout_s, entry_timeout_s: longest wait for an answer, and for the others to come to the sync.
    """

    def __init__(
        self,
        number: int,
        owners: Sequence[int],
        others: dict[int, Link],
        sync: int,
        timeout_s: float,
        entry_timeout_s: float,
    ) -> None:
        self.number = number
        self._owners = owners
        self._others = others
        self._sync = sync
        self._timeout_s = timeout_s
        self._entry_timeout_s = entry_timeout_s
        self._asked = ""
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="r3-sync-beat", daemon=True).start()

    def begin(
        self, weights: list[tuple[str, Weight]], settings: dict[str, Any], recipe: Message | None
    ) -> OutgoingWeights:
        """Wait for the others, and let them begin. Returns what all send, of which this rank has its part.

        Args:
            weights: that are pushed.
            settings: of `OutgoingWeights`.
            recipe: of the transports by which each rank sends its part; None if this rank sends all.

        Raises:
            SyncError: a rank does not come, or has other weights.
        """
        said = fingerprint(weights, settings["frozen"])
        self._asked = "take part"
        came = self.answers(self._entry_timeout_s)
        wrong = [f"rank {number}" for number, message in came.items() if message["weights"] != said]
        if wrong:
            raise SyncError(
                f"{', '.join(wrong)}: expected the weights of rank {self.number}, in the same order, got other names, "
                "shapes or dtypes (or another `frozen`)"
            )
        dtype = settings["dtype"] and str(settings["dtype"]).removeprefix("torch.")
        self.tell("begin", timeout_s=self._timeout_s, dtype=dtype, chunk_bytes=settings["chunk_bytes"], recipe=recipe)
        gathering = Gathering(self._timeout_s)
        outgoing = OutgoingWeights(weights, **settings, owners=self._owners, sender=self.number, gathering=gathering)
        if recipe is not None:
            outgoing.deal()
        return outgoing

    def tell(self, order: str, **more: Any) -> None:
        self._asked = order
        for link in self._others.values():
            link.send({"sync": self._sync, "do": order, **more}, self._timeout_s)

    def answers(self, timeout_s: float | None = None) -> dict[int, Message]:
        """What each of the others answers to the last order. Raises `SyncError`, with all of their problems."""
        problems, found = self._collect(self._timeout_s if timeout_s is None else timeout_s, all_of_them=False)
        if problems:
            raise SyncError(f"{len(problems)} of {len(self._owners)} ranks cannot go on:{summary(problems)}")
        return found

    def rounds(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """`rounds`, of which the others gather each too (`gather`). An error says what they know of it."""
        while True:
            try:
                current = next(rounds)
            except StopIteration:
                return
            except Exception as error:
                problems, _ = self._collect(min(_LATE_S, self._timeout_s), all_of_them=True)
                raise SyncError(f"rank {self.number}: {error}{summary(problems)}") from error
            yield current

    def gather(self, parts: Parts) -> None:
        """Raises `SyncError` if another rank has given up: what this one gathered then would shift all exchanges."""
        for number, link in self._others.items():
            while (message := link.receive(0.0)) is not None:
                if message["sync"] == self._sync:
                    raise SyncError(f"rank {number} {message['error']}")
        self.tell("gather", parts=parts)

    def collect(self, progress: SyncProgress) -> None:
        """Add to `progress` what the others have sent."""
        self.tell("flush")
        for answer in self.answers().values():
            progress.named |= answer["digests"]
            progress.not_finite += answer["not_finite"]
            progress.bytes += answer["bytes"]
            progress.sent_bytes += answer["bytes"]

    def committed(self, version: int) -> None:
        """All workers hold `version`, and serve: let the others know it, so that all ranks end alike.

        Raises:
            SyncError: a rank has given up before, and has raised; or does not answer.
        """
        try:
            self.tell("committed")
            self.answers()
        except SyncError as error:
            raise SyncError(
                f"version {version} has committed on the engines, and not all ranks know it: push a later one. {error}"
            ) from error

    def end(self, error: BaseException | None) -> None:
        """The sync has committed, or failed by `error`: the same goes for the other ranks."""
        self._over.set()
        text = None if error is None else str(error) or type(error).__name__
        for link in self._others.values():
            with contextlib.suppress(SyncError):  # the others know then that this rank has ended, or they have
                lost = isinstance(error, EngineLostError)
                link.send({"sync": self._sync, "do": "end", "error": text, "lost": lost}, self._timeout_s)

    def _collect(self, timeout_s: float, *, all_of_them: bool) -> tuple[list[str], dict[int, Message]]:
        """Problems, and answers by rank. Waits for the others even after one had a problem if `all_of_them`."""
        until = time.monotonic() + timeout_s
        problems: list[str] = []
        found: dict[int, Message] = {}
        waiting = dict(self._others)
        while waiting:
            for number, link in list(waiting.items()):
                try:
                    message = link.receive(0.0)
                    # Of a sync that has failed. The next one may have come with it, and is waited for no more.
                    while message is not None and message["sync"] < self._sync:
                        message = link.receive(0.0)
                except SyncError as error:
                    problems.append(str(error))
                    del waiting[number]
                    continue
                if message is None:
                    continue
                del waiting[number]
                if message["sync"] > self._sync:
                    problems.append(f"rank {number} is one sync ahead: all ranks take part in every sync")
                elif message["error"] is not None:
                    problems.append(f"rank {number}: {message['error']}")
                else:
                    found[number] = message
            left_s = until - time.monotonic()
            if not waiting or left_s <= 0 or (problems and not all_of_them):
                break
            await_any(waiting.values(), left_s)
        if not problems or all_of_them:
            problems += [
                f"rank {number} has not answered ({self._asked}) within {timeout_s:g} s" for number in sorted(waiting)
            ]
        return problems, found

    def _beat(self) -> None:
        """The others wait for this rank as long as it lives, and engines let it wait: longer than any one timeout."""
        while not self._over.wait(min(self._timeout_s, self._entry_timeout_s) / _BEATS):
            for link in self._others.values():
                with contextlib.suppress(SyncError):
                    link.send({"sync": self._sync, "do": "beat"}, self._timeout_s)


def fingerprint(weights: Sequence[tuple[str, Weight]], frozen: Sequence[str]) -> str:
    """The same on ranks that list the same weights, in the same order."""
    listed = [[name, list(weight.shape), str(weight.dtype)] for name, weight in weights]
    return hashlib.blake2b(json.dumps([listed, list(frozen)]).encode(), digest_size=16).hexdigest()
