"""All engines of a weight sync, called in parallel."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

from r3.errors import SyncError, summary
from r3.weight_sync.engines import Engine
from r3.weight_sync.engines.deadline import in_thread
from r3.weight_sync.engines.engine import require_complete
from r3.weight_sync.protocol import Reply
from r3.weight_sync.sender.calls import ParallelCalls, add_note, raise_on_worker_errors
from r3.weight_sync.states import SyncState

OnLost = Literal["raise", "remove"]

_FINISH_S = 30.0

logger = logging.getLogger("r3")


class EngineGroup:
    """The engines of a sync. Each has `timeout_s` to answer a call.

    Attributes:
        engines: that take part.
        lost: why engines were removed in the last sync, by name.
        standing: names of engines that may stand still since the last sync was given up, with the weights they had.
        removes_lost: whether they are.
    """

    def __init__(self, engines: Sequence[Engine], timeout_s: float, on_lost: OnLost = "raise") -> None:
        self.engines: tuple[Engine, ...] = ()
        self.lost: dict[str, str] = {}
        self.standing: set[str] = set()
        self._timeout_s = timeout_s
        self.removes_lost = on_lost == "remove"
        for engine in engines:
            self.add(engine)

    def add(self, engine: Engine) -> None:
        """Let `engine` take part. Its name gets a number if another has it, as engines of this process have."""
        taken, name, number = {each.name for each in self.engines}, engine.name, 1
        while engine.name in taken:
            number += 1
            engine.name = f"{name} #{number}"
        self.engines = (*self.engines, engine)

    def remove(self, engine: Engine) -> None:
        """Leave `engine` out from here on."""
        self.engines = tuple(each for each in self.engines if each is not engine)

    def call(self, method: str, *args: Any) -> list[Reply]:
        """Call `method` on every worker of every engine. Raises if one does not answer, or answers with an error."""
        return self.start(method, *args).result()

    def start(
        self,
        method: str,
        *args: Any,
        timeout_s: float | None = None,
        then: Callable[[Engine], None] = lambda engine: None,
        check: Callable[[list[Reply]], None] = lambda replies: None,
    ) -> ParallelCalls:
        """Start a `call` and return without waiting for it.

        Args:
            then: action on each engine after all of its workers have answered.
            check: validates all answers; raises if they are wrong.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s

        def ask(engine: Engine) -> list[Reply]:
            replies = raise_on_worker_errors(engine, method, engine.replies(method, args, limit_s))
            then(engine)
            return replies

        def check_all(replies: list[Reply]) -> None:
            require_complete(replies, method, self.engines[0].remedy)
            check(replies)

        return ParallelCalls([partial(ask, engine) for engine in self.engines], check_all)

    def pausing(self, served: list[Engine]) -> ParallelCalls:
        """Start to pause all engines. Those that were serving are added to `served`."""

        def pause(engine: Engine) -> None:
            if engine.pause(self._timeout_s):
                served.append(engine)

        return ParallelCalls([partial(pause, engine) for engine in self.engines])

    def commit(self, sync_id: str) -> list[Reply]:
        """Commit on every worker. Where lost engines are removed, one that fails is, if others have committed."""

        def commit(engine: Engine) -> list[Reply]:
            return raise_on_worker_errors(engine, "r3_commit", engine.replies("r3_commit", [sync_id], self._limit_s))

        answers = [reply for replies in self._finish(sync_id, commit) for reply in replies]
        require_complete(answers, "r3_commit", self.engines[0].remedy)
        return answers

    def serve(self, sync_id: str, version: int, until: float) -> None:
        """Label the committed weights, resume the engines, and end the sync. One that fails is removed as by `commit`.

        Raises:
            SyncError: an engine failed; or the lease is over, since another sender may then hold the workers.

        Args:
            until: time of `time.monotonic()` from which the lease may be over.
        """

        def serve(engine: Engine) -> None:
            engine.set_weight_version(version, self._limit_s)
            if time.monotonic() > until:
                raise SyncError(f"{engine.name} is not resumed: this sender stood still, and the lease may be over")
            engine.resume(self._limit_s)
            replies = engine.replies("r3_release", [sync_id], self._limit_s)
            raise_on_worker_errors(engine, "r3_release", replies)

        self._finish(sync_id, serve)

    def abort(self, sync_id: str, cause: str, timeout_s: float, error: BaseException) -> list[Engine]:
        """Abort on every worker. Returns the engines whose workers all say that no weight was touched.

        An engine that does not answer even this is lost. What goes wrong is added to `error`.
        """
        engines, call = self.engines, self.start("r3_abort", sync_id, cause, timeout_s=timeout_s)
        failures = call.failures()
        self.remove_lost({engines[number]: str(failure) for number, failure in failures.items()})
        answered = [engine for number, engine in enumerate(engines) if number not in failures]
        untouched = []
        for engine, replies in zip(answered, call.successes(), strict=True):
            try:
                require_complete(replies, "r3_abort", engine.remedy)
            except SyncError as incomplete:
                add_note(error, f"abort was not acknowledged by all of {engine.name}: {incomplete}")
                continue
            if all(reply["state"] == SyncState.IDLE for reply in replies):
                untouched.append(engine)
        for failure in failures.values():  # the first error is the one to report
            add_note(error, f"abort was not acknowledged: {failure}")
        return untouched

    def resume(self, served: Sequence[Engine], timeout_s: float, error: BaseException) -> None:
        """Resume those of `served` that are left; what goes wrong is added to `error`."""
        left = [engine for engine in served if engine in self.engines]
        try:
            ParallelCalls([partial(engine.resume, timeout_s) for engine in left]).each()
        except Exception as second:
            add_note(error, f"the engine does not go on: {second}")

    def remove_lost(self, causes: dict[Engine, str]) -> bool:
        """Remove engines that do not answer, with a warning, if that is asked for and others are left.

        Returns whether.
        """
        if not self.removes_lost or not causes or len(causes) == len(self.engines):
            return False
        for engine, cause in causes.items():
            self.lost[engine.name] = cause
            self.remove(engine)
            logger.warning("weight sync goes on without %s, which is lost: %s", engine.name, cause)
        return True

    @property
    def _limit_s(self) -> float:
        # The others have committed and stand still meanwhile, until their lease is over.
        return min(_FINISH_S, self._timeout_s / 5) if self.removes_lost else self._timeout_s

    def _finish(self, sync_id: str, action: Callable[[Engine], Any]) -> list[Any]:
        """Results of `action` on every engine, of those that are left."""
        calls = ParallelCalls([partial(action, engine) for engine in self.engines])
        if self.removes_lost:
            engines = self.engines
            lost = {engines[number]: str(error) for number, error in calls.failures().items()}
            if self.remove_lost(lost):
                for engine in lost:  # what still runs there finds its sync aborted
                    in_thread(partial(engine.replies, "r3_abort", [sync_id, "it was lost"], self._timeout_s))
                return calls.successes()
        return calls.each()


def require_names(engines: Iterable[Engine], name: str) -> Engine:
    """The engine called `name`. Raises `SyncError` if there is none."""
    found = [engine for engine in engines if engine.name == name]
    if not found:
        raise SyncError(f"no engine is called {name!r}; there are:{summary(engine.name for engine in engines)}")
    return found[0]
