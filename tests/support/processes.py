"""Processes that tests start, and what is left of them."""

import os
import time

import psutil


def session(leader: int) -> list[str]:
    """Live processes of the session that `leader` began."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, PermissionError, psutil.Error):
            return False  # it ended while we looked, or is another user's

    return [str(process) for process in psutil.process_iter() if belongs(process)]


def all_ended(leader: int, within_s: float = 10.0) -> bool:
    """Whether the session is empty soon after its leader: Python's resource tracker, for one, ends by itself."""
    deadline = time.monotonic() + within_s
    while (left := session(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left
