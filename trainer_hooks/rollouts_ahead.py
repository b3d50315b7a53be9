"""Rollouts of coming steps, sampled in a thread while the last ones train."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from r3.errors import CaptureError

Sampled = TypeVar("Sampled")


class RolloutsAhead(Generic[Sampled]):
    """What `sample(step)` returns, step by step, made before it is asked for.

    Step n may be sampled once the engine has version n - 1 - `max_staleness`: the version that is trained in step n is
    n - 1. With 0 nothing is made ahead, and there is no thread.

    A `vllm.LLM` does one thing at a time: who syncs or evaluates takes it by `engine()`, which waits for the step that
    is being sampled and holds the next one back. A context manager; leaving it lets the thread end, after the step that
    it samples. If it is left by an exception, nothing waits for that.

    Args:
        sample: makes a step's rollouts. One call at a time.
        steps: what is asked for, in this order.
        version: that the engine has, by number of training steps.
        max_staleness: in versions.
        shared: the engines sample, sync and evaluate at a time, so `engine()` waits for nothing.
    """

    def __init__(
        self,
        sample: Callable[[int], Sampled],
        steps: range,
        *,
        version: int = 0,
        max_staleness: int = 0,
        shared: bool = False,
    ) -> None:
        self._sample = sample
        self._steps = steps
        self._version = version
        self._max_staleness = max_staleness
        self._shared = shared
        self._changed = threading.Condition()
        self._made: dict[int, Sampled] = {}
        self._error: BaseException | None = None
        self._sampling = self._taken = self._closed = False
        # A daemon: after an error the engine is shut down under it, and it may never come back from there.
        self._thread = threading.Thread(target=self._run, name="r3-rollouts-ahead", daemon=True)

    def __enter__(self) -> RolloutsAhead[Sampled]:
        if self._max_staleness:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if kind is None and self._thread.is_alive():
            self._thread.join()

    def get(self, step: int) -> Sampled:
        """The rollouts of `step`, each of which is asked for once, as soon as they are there.

        Raises:
            CaptureError: a step out of turn.
            What `sample` raised, in the step that it raised in.
        """
        if not self._max_staleness:
            return self._sample(step)
        with self._changed:
            self._changed.wait_for(lambda: step in self._made or self._error or not self._thread.is_alive())
            if step in self._made:
                return self._made.pop(step)
            if self._error is not None:
                raise self._error
        raise CaptureError(f"rollouts of step {step}: expected one of {self._steps} that was not given yet")

    @contextlib.contextmanager
    def engine(self) -> Iterator[None]:
        """Context in which nothing is sampled, unless the engines are shared."""
        if self._shared:
            yield
            return
        with self._changed:
            self._taken = True  # before the wait, so that the thread does not begin another step
            self._changed.wait_for(lambda: not self._sampling)
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def synced(self, version: int) -> None:
        """The engine has `version`."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for step in self._steps:
                if not self._begin(step):
                    return
                made = self._sample(step)
                with self._changed:
                    self._made[step], self._sampling = made, False
                    self._changed.notify_all()
        except BaseException as error:  # `get` raises it
            with self._changed:
                self._error, self._sampling = error, False
        finally:
            with self._changed:
                self._changed.notify_all()

    def _begin(self, step: int) -> bool:
        """Wait until `step` may be sampled; False if nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._taken and step <= self._version + 1 + self._max_staleness)
            )
            self._sampling = not self._closed
            return self._sampling
