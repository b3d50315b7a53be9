"""Several real `vllm serve`s for tests of the pool, started side by side, that can be stopped and killed."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from places import DEMO_MODEL
from ports import free_port
from processes import all_ended, session

import r3
from r3.capture import server_command

PROMPT_TOKENS = 24


def server_config(*more: str) -> r3.R3Config:
    settings = ["generator.inference_engine.max_num_seqs=64", "generator.inference_engine.kv_cache_gib=0.2", *more]
    return r3.R3Config.from_overrides(settings, {"trainer.policy.model.path": str(DEMO_MODEL)})


class PoolServer:
    """A server in a session of its own, at one address however often it is started.

    With a `prefix` of its command it runs on another `host`, and is asked from there.
    """

    def __init__(self, config: r3.R3Config, folder: Path, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.port = free_port()
        self._host = host
        self._prefix = prefix
        self._config = config
        self._log = folder / f"server-{self.port}.log"
        self.url = f"http://{host}:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin to start it; `wait` until it answers."""
        extra = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [*self._prefix, *server_command(self._config), "--host", self._host, "--port", str(self.port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | extra,
            )

    def wait(self, timeout_s: float = 280) -> None:
        """Until it answers; also a first request, which takes far longer than later ones."""
        until = time.monotonic() + timeout_s
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.3)
        if not self._prefix:
            (model,) = httpx.get(f"{self.url}/v1/models").json()["data"]
            asked = {"model": model["id"], "prompt": [2] * PROMPT_TOKENS, "max_tokens": 4}
            httpx.post(f"{self.url}/v1/completions", json=asked, timeout=timeout_s).raise_for_status()

    def healthy(self) -> bool:
        if self._prefix:
            ask = f"import urllib.request as u; u.urlopen({self.url + '/health'!r}, timeout=5)"
            return subprocess.run([*self._prefix, sys.executable, "-c", ask], stderr=subprocess.DEVNULL).returncode == 0
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def signal(self, number: int) -> None:
        """To all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End all its processes at once, as a machine that goes down does."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self):
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def close(self) -> list[str]:
        """End it. Returns what is left of its processes."""
        if self.process is None:
            return []
        self.signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        left = [] if all_ended(self.process.pid) else session(self.process.pid)
        self.kill()
        return left


@contextlib.contextmanager
def pool_servers(count: int, *settings: str):
    """`count` servers of the demo's model, ready for requests and syncs."""
    with tempfile.TemporaryDirectory() as folder:
        servers = [PoolServer(server_config(*settings), Path(folder)) for _ in range(count)]
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait()
            yield servers
        finally:
            left = [process for server in servers for process in server.close()]
    assert not left, f"processes of servers outlived them: {left}"
