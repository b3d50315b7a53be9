"""Calls in threads: kept for the next call, never in the way of it or of the process's end."""

import subprocess
import sys
import threading
import time

import pytest

from r3.weight_sync.engines import deadline as waiting
from r3.weight_sync.engines.deadline import in_thread


@pytest.fixture
def result(monkeypatch):
    """The result of a call, once its thread waits for another."""
    monkeypatch.setattr(waiting, "_idle", idle := [])

    def result(function):
        try:
            return in_thread(function).result(60)
        finally:
            end = time.monotonic() + 60
            while not idle and time.monotonic() < end:
                time.sleep(0.01)

    return result


def test_a_thread_is_used_again_also_after_an_error(result):
    first = result(threading.get_ident)
    with pytest.raises(SystemExit, match="over"):
        result(lambda: sys.exit("over"))
    assert result(threading.get_ident) == first != threading.get_ident()


def test_a_thread_that_cannot_give_its_answer_is_given_no_other_call():
    """What a signal's exception leaves that comes within `futures.wait`: the lock of the future stays taken."""
    release = threading.Event()
    unheard = in_thread(lambda: release.wait(60))
    with unheard._condition:
        release.set()
        time.sleep(0.5)
        assert in_thread(lambda: "next").result(60) == "next"
    assert unheard.result(60)


def test_calls_that_wait_for_each_other_run_side_by_side():
    barrier = threading.Barrier(5)
    assert sorted(call.result() for call in [in_thread(lambda: barrier.wait(60)) for _ in range(5)]) == [0, 1, 2, 3, 4]


def test_a_call_that_never_returns_holds_neither_the_next_one_nor_the_process():
    program = (
        "import threading; from r3.weight_sync.engines.deadline import in_thread\n"
        "in_thread(threading.Event().wait); print(in_thread(lambda: 'next').result())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "next\n"), done.stderr


def test_a_forked_process_starts_threads_of_its_own():
    program = (
        "import os, threading; from r3.weight_sync.engines.deadline import in_thread\n"
        "in_thread(int).result()\n"  # leaves a thread that the fork does not have
        "if not (child := os.fork()):\n"
        "    threading.Timer(30, lambda: os._exit(1)).start()\n"
        "    os._exit(in_thread(int).result())\n"
        "raise SystemExit(os.waitpid(child, 0)[1] != 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
