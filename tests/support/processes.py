"""Processes that tests start, and what is left of them."""

import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from unittest import mock

import psutil

FORKS = multiprocessing.get_context("forkserver")
"""Makes processes in little time: by forks of one that has imported what they need, and has no threads."""


def fork_from(module: str) -> None:
    """Have `FORKS` import this module once, before its first process.

    By the environment: the fork server of Python 3.11.7 does not use the path that it is given. It then imports nothing
    and says nothing, and each process imports all by itself.
    """
    FORKS.set_forkserver_preload([module])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


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
