"""`vllm serve`s of this host that end with the process that started them."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from r3.capture import guard as guard_module
from r3.capture.serve import server_command
from r3.capture.stop_signals import terminated_by_exception
from r3.config import R3Config, environment, variables
from r3.errors import CaptureError, ConfigError
from r3.http import FAILURES, HttpClient, StatusError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOK_S = 0.5
_END_S = 30.0
_END_START_S = 3.0
"""Of a server that has not answered yet: nothing is lost with it."""

logger = logging.getLogger("r3")


@contextlib.contextmanager
def running_servers(config: R3Config, *, host: str = "127.0.0.1", timeout_s: float = 900.0) -> Iterator[list[str]]:
    """Addresses of `generator.inference_engine.num_engines` servers of this host, ready for requests and syncs.

    Each has GPUs of its own, in the order of their numbers. Their processes end when the context is left, also by an
    exception, by Ctrl-C or SIGTERM, and when this process is killed.

    Args:
        config: of the engines.
        host: the address of this host at which they listen.
        timeout_s: longest wait for all of them to be ready.

    Raises:
        ConfigError: more engines than there are GPUs for.
        CaptureError: one did not start; with the end of its log.
    """
    command = server_command(config)
    gpus = _gpus_of_each(config)
    with terminated_by_exception(), tempfile.TemporaryDirectory(prefix="r3-servers-") as folder:
        servers: list[_Server] = []
        try:
            for number, visible in enumerate(gpus):
                servers.append(_Server(command, Path(folder) / f"server-{number}.log", visible, host))
            until = time.monotonic() + timeout_s
            while sum(server.is_ready() for server in servers) < len(servers):
                if time.monotonic() > until:
                    slow = [server for server in servers if not server.is_ready()]
                    raise CaptureError(f"{len(slow)} servers are not ready after {timeout_s:g} s:\n{slow[0].log_end()}")
                time.sleep(_LOOK_S)
            yield [server.url for server in servers]
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait()


class _Server:
    def __init__(self, command: list[str], log: Path, visible: str | None, host: str) -> None:
        port = _free_port(host)
        self.url = f"http://{host}:{port}"
        self._log = log
        self._ready = False
        more = {"VLLM_SERVER_DEV_MODE": "1"} | ({} if visible is None else {_VISIBLE: visible})
        guard = [sys.executable, "-I", "-S", guard_module.__file__, str(os.getpid())]
        with log.open("wb") as out, environment(**more):
            self._process = subprocess.Popen(
                [*guard, *command, "--host", host, "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is this process's
            )
        logger.info("starting an engine at %s", self.url)

    def is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise CaptureError(f"the server at {self.url} has ended ({self._process.returncode}):\n{self.log_end()}")
        if not self._ready:
            with contextlib.suppress(StatusError, *FAILURES):
                HttpClient(base=self.url).send("/health", None, 5.0)
                self._ready = True
        return self._ready

    def log_end(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def terminate(self) -> None:
        self._process.terminate()
        self._until = time.monotonic() + (_END_S if self._ready else _END_START_S)

    def wait(self) -> None:
        """Wait until it has ended, and end what is left of its processes."""
        if not self._ends_by(self._until):
            self._process.terminate()  # the guard kills it, then
            self._ends_by(time.monotonic() + _END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ends_by(self, until: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        return self._process.poll() is not None


def _gpus_of_each(config: R3Config) -> list[str | None]:
    """What each engine's CUDA_VISIBLE_DEVICES is; None on the CPU."""
    import torch

    engine = config.generator.inference_engine
    if not torch.cuda.is_available():
        return [None] * engine.num_engines
    size, found = engine.tensor_parallel_size * engine.pipeline_parallel_size, torch.cuda.device_count()
    if engine.num_engines * size > found:
        raise ConfigError(
            f"generator.inference_engine.num_engines: expected at most {found // size}, since {found} GPUs are visible "
            f"and each engine takes {size}, got {engine.num_engines}"
        )
    names = variables([_VISIBLE]).get(_VISIBLE, ",".join(map(str, range(found)))).split(",")
    return [",".join(names[n * size : (n + 1) * size]) for n in range(engine.num_engines)]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
