"""Engines for tests of a sync's sender, whose workers hold states and versions as real ones do, and no weights."""

from collections.abc import Sequence
from typing import Any

from r3.errors import SyncError
from r3.weight_sync import Engine, combine
from r3.weight_sync.states import SyncState


class PlainEngine(Engine):
    """One worker that follows the protocol of a sync.

    Attributes:
        lost_before: the call from which on it does not answer.
        lost: whether it does not answer.
        serves: whether it was resumed.
        replies_after_commit: what it says beside or instead of the right answer to a commit.
    """

    remedy = ""

    def __init__(self, name: str, lost_before: str = "") -> None:
        self.name, self.lost_before = name, lost_before
        self.lost = False
        self.serves = True
        self.version: int | None = None
        self.state = SyncState.IDLE
        self.cause = ""
        self.replies_after_commit: dict[str, Any] = {}
        self.asked: list[str] = []
        self._touched = False

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        self._answer(method)
        more: dict[str, Any] = {}
        match method:
            case "r3_reserve":
                if self.version is not None and args[1] <= self.version:
                    more = {"error": f"expected a version above {self.version}, got {args[1]}"}
                else:
                    self._next, self.state, self._touched = args[1], SyncState.RESERVED, False
            case "r3_begin":
                self.state, more = SyncState.OPEN, {"draft": "", "kept": {}}
            case "r3_load":
                self._touched = True
            case "r3_seal":
                self.state, self._digest = SyncState.SEALED, combine(args[1])
                more = {"digest": self._digest}
            case "r3_commit":
                self.state, self.version, self.cause = SyncState.COMMITTED, self._next, ""
                more = {"digest": self._digest} | self.replies_after_commit
            case "r3_release":
                self.state = SyncState.IDLE
            case "r3_abort":
                self.cause = str(args[1]) if self._touched else self.cause
                self.state = SyncState.POISONED if self.cause else SyncState.IDLE
        reply = {"rank": 0, "dp_rank": 0, "world_size": 1, "dp_size": 1, "worker": self.name, "gpu": None}
        reply |= {"version": self.version, "state": self.state.value, "cause": self.cause}
        return [reply | {"connection_id": None, "base_version": None} | more]

    def pause(self, timeout_s: float) -> bool:
        self._answer("pause")
        served, self.serves = self.serves, False
        return served

    def resume(self, timeout_s: float) -> None:
        self._answer("resume")
        self.serves = True

    def refuse(self, cause: str) -> None:
        pass

    def reset_caches(self, timeout_s: float) -> None:
        self._answer("caches")

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        self._answer("label")

    def _answer(self, what: str) -> None:
        self.asked.append(what)
        self.lost = self.lost or what == self.lost_before
        if self.lost:
            raise SyncError(f"{self.name}: no answer to {what}")
