"""Runs a command that ends, with all processes below it, when the process that started this one ends in whatever way.

`python guard.py PID COMMAND...`, as a file and not a module: it stays for as long as the command, and imports nothing.

It is two processes. A keeper starts the command, and ends what is left of its session. The one before it only waits and
passes on SIGTERM: SIGKILL to it, as Ray sends to the children of a worker that ends, leaves the keeper to its work. A
vLLM server that gets SIGKILL leaves its engine behind.

A second SIGTERM kills at once what the first has not ended: a vLLM server that starts takes the first for Ctrl-C,
catches that, and goes on to wait for its engine (0.30).
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

END_S = 25.0
"""After the first SIGTERM, until what does not end is killed."""
_PR_SET_PDEATHSIG = 1
_WATCHED = (signal.SIGTERM, signal.SIGCHLD)


def main(parent: int, command: list[str]) -> int:
    """Returns the exit code of `command`; 128 and the signal's number, if one ended it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # until they are waited for
    _end_with(parent)
    first = os.getpid()
    keeper = os.fork()
    if keeper:
        return _exit_code(keeper, kills=False)
    _end_with(first)
    keeper = os.getpid()
    server = os.fork()
    if not server:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        _end_with(keeper)
        os.execvp(command[0], command)
    return _exit_code(server, kills=True)


def _exit_code(child: int, *, kills: bool) -> int:
    """Of `child`, which gets the SIGTERM that this process gets. `kills` ends what is left of its session."""
    until = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if kills and (ended or (until is not None and time.monotonic() >= until)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        got = signal.sigtimedwait(_WATCHED, 1.0)
        if got is not None and got.si_signo == signal.SIGTERM:
            os.kill(child, signal.SIGTERM)
            until = time.monotonic() + (END_S if until is None else 0.0)


def _end_with(parent: int) -> None:
    """Let the kernel send this process SIGTERM when `parent`, which has started it, ends in whatever way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the process that started this server has ended")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
