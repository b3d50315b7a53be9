"""Sender processes as the harness sees them."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from fault_engine import state

TIMEOUT_S = 3.0  # of one call, and the lease


class Sender:
    """A process that sends."""

    def __init__(self, context: Any, settings: dict[str, Any]) -> None:
        import fault_sender

        self.settings = settings
        self.folder = ""
        self._end, there = context.Pipe()
        self._go = context.Event()
        self.process = context.Process(target=fault_sender.serve, args=(there, self._go, settings), daemon=True)
        self.process.start()
        if not self._end.poll(60) or self._end.recv()[0] != "ready":
            raise RuntimeError("a sender does not start")
        there.close()
        self.events: list[dict] = []
        self.reply: tuple[str, dict] | None = None
        self.seconds = 0.0

    def order(self, **order: Any) -> None:
        self.events, self.reply, self._start, self.told = [], None, time.monotonic(), False
        self._go.clear()
        self._end.send({"timeout_s": TIMEOUT_S, "on_running": "wait"} | order)

    def poll(self, wait_s: float = 0.02) -> bool:
        """Take in what it says. Whether it has ended its sync, one way or the other."""
        if self.reply is not None:
            return True
        try:
            while self._end.poll(wait_s):
                kind, what = self._end.recv()
                if kind == "event":
                    self.events.append(what)
                    continue
                if kind == "folder":
                    self.folder = what
                    continue
                self.reply = (kind, what)
                break
        except (EOFError, ConnectionError):
            self.process.join(5)
            self.reply = ("died", {"text": f"exit status {self.process.exitcode}"})
        if self.reply is not None:
            self.seconds = time.monotonic() - self._start
        return self.reply is not None

    def go_on(self) -> None:
        self.told = True
        self._go.set()

    def holds(self) -> bool:
        return any(event["kind"] == "held" for event in self.events)

    def stopped(self) -> bool:
        return state(self.process.pid) == "T"

    def alive(self) -> bool:
        return self.process.is_alive()

    def stacks(self) -> str:
        """Where its threads are, for the report of a hang."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return Path(self.settings["stacks"]).read_text()

    def end(self) -> None:
        if self.alive():
            os.kill(self.process.pid, signal.SIGCONT)
            with contextlib.suppress(OSError):
                self._end.send(None)
            self.process.join(5)
            self.process.kill()
        self.process.join()
        self._end.close()
