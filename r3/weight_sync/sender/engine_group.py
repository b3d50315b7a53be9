"""All engines of a weight sync, called side by side."""

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
    """The engines, each of which has `timeout_s` for any one answer."""

    def __init__(self, engines: Sequence[Engine], timeout_s: float) -> None:
        self.engines = tuple(engines)
        self._timeout_s = timeout_s

    def call(self, method: str, *args: Any) -> list[Reply]:
        """Call `method` on every worker of every engine; raises if one did not answer, or answered with an error."""
        return self.start(method, *args).result()

    def start(
        self,
        method: str,
        *args: Any,
        timeout_s: float | None = None,
        then: Callable[[Engine], None] = lambda engine: None,
        check: Callable[[list[Reply]], None] = lambda replies: None,
    ) -> ParallelCalls:
        """`call`, under way.

        Args:
            then: what each engine does once all of its workers have answered.
            check: of all answers.
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
        """`action` of every engine."""
        ParallelCalls([partial(action, engine) for engine in self.engines]).result()

    def pausing(self, served: list[Engine]) -> ParallelCalls:
        """The engines' pauses, under way. Those that were serving come into `served`."""

        def pause(engine: Engine) -> None:
            if engine.pause(self._timeout_s):
                served.append(engine)

        return ParallelCalls([partial(pause, engine) for engine in self.engines])

    def resume(self, until: float) -> None:
        """Let the engines serve, if their workers are still this sender's: one that was late may have lost them.

        Args:
            until: of `time.monotonic()`, after which the lease may be over.
        """

        def resume(engine: Engine) -> None:
            if time.monotonic() > until:
                raise SyncError(f"{engine.name} is not resumed: this sender stood still, and the lease may be over")
            engine.resume(self._timeout_s)

        self.each(resume)
