"""The queue of one sink, and the thread that empties it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from r3.errors import DiagnosticsError

logger = logging.getLogger("r3")


class Sink(Protocol):
    """Takes metrics somewhere, in its own thread; may block and raise."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None:
        """Write what is left."""
        ...


@dataclass(frozen=True, kw_only=True)
class SinkCounts:
    """Steps of one sink: `dropped` did not fit into its queue or were left when time was up, `failed` raised."""

    written: int = 0
    dropped: int = 0
    failed: int = 0


class SinkWorker:
    """Hands steps to `sink` in a thread; at most `queue_steps` wait for it. What the sink raises is counted."""

    def __init__(self, name: str, sink: Sink, queue_steps: int) -> None:
        self._name, self._sink, self._limit = name, sink, queue_steps
        self._queue: deque[tuple[int, dict[str, float]]] = deque()
        self._changed = threading.Condition()
        self._finishing = self._reported = False
        self._written = self._dropped = self._failed = 0
        self._complaints: set[str] = set()
        self._thread: threading.Thread | None = None

    @property
    def counts(self) -> SinkCounts:
        with self._changed:
            return SinkCounts(written=self._written, dropped=self._dropped, failed=self._failed)

    def put(self, step: int, values: dict[str, float]) -> None:
        with self._changed:
            if self._finishing:
                raise DiagnosticsError(f"sink {self._name}: step {step} was logged after close()")
            full = len(self._queue) >= self._limit
            if full:
                self._dropped += 1
            else:
                self._queue.append((step, values))
                self._changed.notify()
        if full:
            self._complain("queue", f"is {self._limit} steps behind: steps are dropped from step {step} on")
        self._start()

    def finish(self) -> None:
        """Ask the thread to write what is queued, close the sink and end."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._start()

    def wait(self, deadline: float) -> None:
        """Wait for the thread's end, and say what was lost."""
        assert self._thread is not None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            if self._reported:
                return
            self._reported = True
            if self._thread.is_alive():
                # The thread, if it ever comes back, finds nothing to write.
                self._dropped += len(self._queue)
                self._queue.clear()
                logger.warning("sink %s: did not finish in time and is left behind", self._name)
            lost = self._dropped + self._failed
            if lost:
                logger.warning(
                    "sink %s: %d of %d steps are not in it (%d dropped, %d failed); metrics.jsonl has them",
                    self._name,
                    lost,
                    lost + self._written,
                    self._dropped,
                    self._failed,
                )

    def _start(self) -> None:
        # Not before it is needed: processes that are forked meanwhile have one thread less to lose.
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"r3-sink-{self._name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            self._write(*item)
        try:
            self._sink.close()
        except Exception as error:
            self._complain("close", f"could not be closed: {type(error).__name__}: {error}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._sink.write(step, values)
        except Exception as error:
            with self._changed:
                self._failed += 1
            self._complain("write", f"step {step} failed: {type(error).__name__}: {error}")
        else:
            with self._changed:
                self._written += 1

    def _next(self) -> tuple[int, dict[str, float]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._finishing)
            return self._queue.popleft() if self._queue else None

    def _complain(self, kind: str, what: str) -> None:
        if kind not in self._complaints:
            self._complaints.add(kind)
            logger.warning("sink %s: %s; more of this is counted, not logged", self._name, what)
