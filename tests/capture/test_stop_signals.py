"""Ctrl-C and SIGTERM while an engine starts, by stand-ins for what vLLM does with them and with its processes."""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from r3.capture import stop_signals
from r3.capture.stop_signals import interruptible_start, terminated_by_exception

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _handlers():
    """Python's own, also where the tests run as a shell's background job; and they are there again afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    others = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is others
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def swallows(kind, then=lambda: None):
    """As vLLM does while it waits for an engine; then it goes on."""
    with contextlib.suppress(kind):
        signal.raise_signal(signal.SIGINT)
    then()


def fails():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise RuntimeError("the engine has ended") from None


def test_ctrl_c_passes_what_catches_keyboard_interrupts():
    went_on = []
    with pytest.raises(KeyboardInterrupt), interruptible_start():
        swallows(KeyboardInterrupt, then=lambda: went_on.append(True))
    assert not went_on


@pytest.mark.parametrize("start", [lambda: swallows(BaseException), fails], ids=["goes on", "fails of it"])
def test_ctrl_c_is_raised_at_the_end_where_all_is_caught(start):
    with pytest.raises(KeyboardInterrupt), interruptible_start():
        start()


def test_an_error_of_the_start_itself_is_raised_as_it_is():
    with pytest.raises(LookupError), interruptible_start():
        raise LookupError


def test_sigterm_ends_a_start_as_it_ends_what_follows():
    with pytest.raises(SystemExit) as ended, terminated_by_exception(), interruptible_start():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_what_the_users_own_handler_does_is_done():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with interruptible_start():
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT]

    def raises(number, frame):
        raise LookupError(number)

    signal.signal(signal.SIGINT, raises)
    with pytest.raises(LookupError), interruptible_start():
        swallows(LookupError)
    assert signal.getsignal(signal.SIGINT) is raises
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible_start():
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


def test_in_another_thread_it_does_nothing():
    raised = []

    def start():
        try:
            with terminated_by_exception(), interruptible_start():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert not raised


def works(ready=None, stubborn=False):
    """An engine's process; if `stubborn`, it and one below it take no signal but SIGKILL."""
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
        below = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        below.stdout.readline()
    if ready:
        ready.set()
    time.sleep(60)


@contextlib.contextmanager
def engine_started():
    """The start of an engine of two processes, the second of which has ended afterwards."""
    ready, below = FORK.Event(), []
    engine = FORK.Process(target=works, args=(ready, True), name="EngineCore", daemon=True)
    try:
        with interruptible_start():
            engine.start()
            assert ready.wait(20)
            below.extend(psutil.Process(engine.pid).children())
            yield engine
    finally:
        left = [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        for process in [engine, *left]:
            process.kill()
        assert len(below) == 1
        assert not left


def test_what_a_start_leaves_is_ended_and_nothing_else(monkeypatch):
    monkeypatch.setattr(stop_signals, "_END_S", 1.0)
    older = FORK.Process(target=works, name="EngineCore", daemon=True)
    other = FORK.Process(target=works, name="loader of data", daemon=True)
    older.start()
    again = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))

    def interrupted_twice():
        with engine_started() as engine:
            other.start()
            again.start()  # comes while the engine is being ended
            signal.raise_signal(signal.SIGINT)
        pytest.fail(f"{engine} was not interrupted")

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    for process in (older, other):
        assert process.is_alive()
        process.kill()


def test_what_lost_its_parent_is_ended_too(monkeypatch):
    monkeypatch.setattr(stop_signals, "_END_S", 1.0)

    def killed_by_vllm():
        with engine_started() as engine:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                engine.kill()
                engine.join()

    with pytest.raises(KeyboardInterrupt):
        killed_by_vllm()


class HalfMade(FORK.Process):
    """Gets Ctrl-C when it runs and its maker does not know its id yet."""

    @staticmethod
    def _Popen(process):
        made = FORK.Process._Popen(process)
        signal.raise_signal(signal.SIGINT)
        return made


def test_no_process_is_lost_that_ctrl_c_finds_half_made():
    engine = HalfMade(target=works, name="EngineCore", daemon=True)

    def start():
        engine.start()
        assert engine.is_alive()
        time.sleep(20)

    with pytest.raises(KeyboardInterrupt), interruptible_start():
        start()
    assert engine.exitcode is not None


def test_a_forked_process_of_the_engine_ends_by_sigterm():
    ready = FORK.Event()
    engine = FORK.Process(target=works, args=(ready,), name="EngineCore", daemon=True)
    with terminated_by_exception(), interruptible_start():
        engine.start()
        assert ready.wait(20)
        engine.terminate()
        engine.join(10)
        assert engine.exitcode == 143
