"""Ctrl-C and SIGTERM where engines start and run: both end what was started."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

_NAMES = ("EngineCore", "VllmWorker", "VLLM_")
"""With what the names of vLLM's processes begin."""
_AGAIN_S = 0.05
_END_S = 4.0


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that open contexts are closed. Only the main thread may set signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible_start() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the start of a `vllm.LLM` in this context, and the processes that it has started.

    vLLM catches KeyboardInterrupt while it waits for an engine, and then waits for 10 minutes (0.30:
    `zmq_socket_ctx`). So whatever the signal's own handler raises comes there as SystemExit, and leaves this context as
    what it was, also where vLLM has caught that or has failed of it. Handlers that raise nothing, and signals that are
    ignored, change nothing. Only the main thread may set signal handlers: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {int(number): handler for number, handler in found.items() if callable(handler)}
    owner, main, over, place = os.getpid(), threading.get_ident(), False, None
    raised: list[BaseException] = []
    late: list[int] = []
    engine = _EngineProcesses()

    def stop(number: int, frame: Any) -> None:
        forked = os.getpid() != owner  # a process of the engine, which has inherited this
        if over and not forked:
            late.append(number)
            return
        if not forked and _starts_a_process(frame):
            again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, number))
            again.daemon = True
            again.start()
            return
        try:
            handlers[number](number, frame)
        except BaseException as error:
            if not forked:
                raised.append(error)
                engine.look()
            raise SystemExit(128 + number) from None

    try:
        for number in handlers:
            signal.signal(number, stop)
        yield
    except BaseException as error:
        if not raised:
            raise
        place = error.__traceback__
    finally:
        over = True
        if raised:
            engine.end()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if raised:
        raise raised[0].with_traceback(place) from None
    for number in late:
        signal.raise_signal(number)


def _starts_a_process(frame: Any) -> bool:
    """Whether an exception now would leave a process behind that its maker does not know yet."""
    while frame is not None:
        if frame.f_code is BaseProcess.start.__code__:
            return True
        frame = frame.f_back
    return False


class _EngineProcesses:
    """vLLM's processes that this one starts from now on, and all below them."""

    def __init__(self) -> None:
        self._others = set(multiprocessing.active_children())
        self._below: set[psutil.Process] = set()

    def look(self) -> list[Any]:
        """Note what is below them, which later may have lost its parent. Returns those that this process started."""
        children = [child for child in multiprocessing.active_children() if child not in self._others]
        own = [child for child in children if child.name.startswith(_NAMES)]
        for child in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._below.update(psutil.Process(child.pid).children(recursive=True))
        return own

    def end(self) -> None:
        """End what is left of them: most has been ended by vLLM itself."""
        own = self.look()
        left = self._running(own)
        for ask in ("terminate", "kill"):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, ask)()
            until = time.monotonic() + _END_S
            while (left := self._running(own)) and time.monotonic() < until:
                time.sleep(_AGAIN_S)

    def _running(self, own: list[Any]) -> list[Any]:
        return [*(child for child in own if child.is_alive()), *filter(_runs, self._below)]


def _runs(process: psutil.Process) -> bool:
    """Not so of one that has ended and that the process which got it from its parent, as PID 1, does not wait for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
