"""A command under `r3.capture.guard` ends, with all that it started, however the process that wanted it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r3.capture import guard

# It ignores nothing, and its child ignores SIGTERM: as an engine below a server does.
SERVER = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
print("ready", flush=True)
time.sleep(600)
"""
STUBBORN = SERVER.replace('print("ready"', 'signal.signal(signal.SIGTERM, signal.SIG_IGN); print("ready"')
PARENT = """
import os, subprocess, sys, time
process = subprocess.Popen([*sys.argv[1:5], str(os.getpid()), *sys.argv[5:]], start_new_session=True)
print(process.pid, flush=True)
time.sleep(600)
"""


def guarded(*command: str) -> list[str]:
    return [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]


def has(process: Path, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return mark.encode() in (process / "environ").read_bytes()
    return False


def marked(mark: str) -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if has(path, mark)]


def all_ended(mark: str, within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not marked(mark)


@pytest.fixture
def mark(tmp_path):
    yield str(tmp_path)
    for pid in marked(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)])
def test_it_ends_as_the_command_does(code, expected):
    assert subprocess.run(guarded(sys.executable, "-c", f"import os, sys; {code}")).returncode == expected


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_command_and_what_it_started(mark, sent):
    process = subprocess.Popen(
        guarded(sys.executable, "-c", SERVER), stdout=subprocess.PIPE, text=True, env=os.environ | {"MARK": mark}
    )
    assert process.stdout.readline() == "ready\n"
    assert len(marked(mark)) == 4
    process.send_signal(sent)
    assert process.wait(10) == (128 + sent if sent == signal.SIGTERM else -sent)
    process.stdout.close()
    assert all_ended(mark)


def test_a_parent_that_is_killed_ends_it(mark):
    script = [sys.executable, "-c", PARENT, *guarded()[:-1], sys.executable, "-c", SERVER]
    parent = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=os.environ | {"MARK": mark})
    assert "ready\n" in (parent.stdout.readline(), parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all_ended(mark)


def test_what_does_not_end_is_killed(mark):
    short = Path(guard.__file__).read_text().replace("END_S = 25.0", "END_S = 1.0")
    script = Path(mark) / "guard.py"
    script.write_text(short)
    command = [sys.executable, "-I", "-S", str(script), str(os.getpid()), sys.executable, "-c", STUBBORN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"MARK": mark})
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(10) == 137
    process.stdout.close()
    assert all_ended(mark)


def test_a_second_sigterm_kills_at_once(mark):
    command = guarded(sys.executable, "-c", STUBBORN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"MARK": mark})
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(10) == 137
    process.stdout.close()
    assert all_ended(mark)
