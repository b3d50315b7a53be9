"""All engines of a weight sync, called in parallel."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from r3.errors import SyncError
from r3.weight_sync.engines import Engine
from r3.weight_sync.engines.engine import require_complete
from r3.weight_sync.protocol import Reply
from r3.weight_sync.sender.calls import ParallelCalls, raise_on_worker_errors


class EngineGroup:
    """The engines of a sync. Each has `timeout_s` to answer a call."""

    def __init__(self, engines: Sequence[Engine], timeout_s: float) -> None:
        self.engines = tuple(engines)
        self._timeout_s = timeout_s

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

    def each(self, action: Callable[[Engine], None]) -> None:
        """Run `action` on every engine in parallel."""
        ParallelCalls([partial(action, engine) for engine in self.engines]).result()

    def pausing(self, served: list[Engine]) -> ParallelCalls:
        """Start to pause all engines. Those that were serving are added to `served`."""

        def pause(engine: Engine) -> None:
            if engine.pause(self._timeout_s):
                served.append(engine)

        return ParallelCalls([partial(pause, engine) for engine in self.engines])

    def resume(self, until: float) -> None:
        """Resume the engines. Raises if the lease is over, since another sender may then hold their workers.

        Args:
            until: time of `time.monotonic()` from which the lease may be over.
        """

        def resume(engine: Engine) -> None:
            if time.monotonic() > until:
                raise SyncError(f"{engine.name} is not resumed: this sender stood still, and the lease may be over")
            engine.resume(self._timeout_s)

        self.each(resume)
