"""Waiting for an engine with a deadline of our own: vLLM's clients wait for ever when an engine stops or dies."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_any
from functools import partial
from queue import SimpleQueue
from typing import Any

from r3.errors import SyncError

POLL_S = 0.05


class Deadline:
    """`timeout_s` from now on, shared by the steps of one call.

    Raises:
        SyncError: `timeout_s` is not above 0.
    """

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise SyncError(f"timeout_s: expected above 0, got {timeout_s!r}")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds left; 0 once the deadline has passed."""
        return max(0.0, self._end - time.monotonic())


_idle: list[SimpleQueue] = []  # of threads that wait for work
os.register_at_fork(after_in_child=_idle.clear)


def in_thread(function: Callable[[], Any]) -> Future:
    """Call `function` in a daemon thread, and return its future. A call that never returns does not hold the process.

    Threads are kept for the next call, since starting one takes longer than most of the calls.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, and takes its answer
    try:
        work = _idle.pop()
    except IndexError:
        work = SimpleQueue()
        threading.Thread(target=_serve, args=(work,), name="r3-sync-call", daemon=True).start()
    work.put((function, future))
    return future


def _serve(work: SimpleQueue) -> None:
    while True:
        function, future = work.get()
        answer: Callable[[], None]
        try:
            answer = partial(future.set_result, function())
        except BaseException as error:
            answer = partial(future.set_exception, error)
        del function, future
        # It may never come through: an exception that a signal raises within `futures.wait` leaves the future's lock
        # with the thread that waited.
        answer()
        del answer
        _idle.append(work)


def answer_of(future: Future, deadline: Deadline, *, where: str, operation: str, dead: Callable[[], str | None]) -> Any:
    """The result of `future`. Raises `SyncError` when the deadline has passed, or `dead` says why the engine died.

    A later answer is dropped. Exceptions of the future itself are raised unchanged.
    """
    while True:
        done, _ = wait_for_any([future], timeout=min(POLL_S, deadline.left_s))
        if done:
            return future.result()
        cause = dead()
        if cause is not None:
            raise SyncError(f"{where}: {cause} while {operation} was waited for. Start it anew, then sync")
        if not deadline.left_s:
            raise SyncError(
                f"{where}: no answer to {operation} within {deadline.timeout_s:g} s. It may still run there; what is "
                "called next comes after it, and its late answer is dropped"
            )
