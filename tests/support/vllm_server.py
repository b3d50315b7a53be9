"""A real `vllm serve` for the tests, in a session of its own, of which nothing is left."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from ports import free_port
from processes import all_ended

from r3 import R3Config
from r3.capture import server_command


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    process: subprocess.Popen

    def kill(self) -> None:
        """End all its processes at once, as a machine that goes down does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running_server(config: R3Config, folder: Path, *extra: str, timeout_s: float = 240) -> Iterator[Server]:
    """The server of `config` with the arguments `extra`, ready for requests. Its log is in `folder`."""
    port = free_port()
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*server_command(config), "--host", "127.0.0.1", "--port", str(port), *extra],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(url=f"http://127.0.0.1:{port}", process=process)
    try:
        _wait(server, log, time.monotonic() + timeout_s)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        ended = all_ended(process.pid, within_s=30.0)  # workers of a server that was killed find that out first
        with contextlib.suppress(ProcessLookupError):
            server.kill()
    assert ended, "processes of the server outlived it"


def _wait(server: Server, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start (exit status {server.process.poll()}):\n{log.read_text()[-4000:]}")
