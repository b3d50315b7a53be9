"""The server of the fault tests, what its workers answer, and who is left of its processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from places import DEMO_MODEL
from ports import free_port
from processes import all_ended, session
from receivers import for_nccl

import r3
from r3.capture import server_command

TOKENS = 12
QUIET_S = 0.6  # an engine that serves has mostly answered by then
LONG = 40  # tokens of a request that is under way while weights come
Output = tuple[tuple[str, float], ...]


class FaultyServer:
    """A real `vllm serve` on a port of its own, which a supervisor (the harness) can start again.

    Args:
        gpu: one worker, on the first GPU; else two tensor-parallel ones on the CPU.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        self._gpu = gpu
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._folder = tempfile.TemporaryDirectory()
        self._client = httpx.Client(base_url=self.url)
        of = torch.Generator().manual_seed(0)
        # The first is longer than a block of the KV cache: stale prefixes would show.
        self._prompts = [torch.randint(2, 300, (length,), generator=of).tolist() for length in (200, 20)]
        self.starts = 0
        self.workers: dict[int, int] = {}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        settings = [
            f"generator.inference_engine.tensor_parallel_size={1 if self._gpu else 2}",
            "generator.inference_engine.enable_return_routed_experts=false",
            "trainer.policy.fsdp_config.moe_enable_routing_replay=false",
        ]
        config = r3.R3Config.from_overrides(settings, {"trainer.policy.model.path": str(DEMO_MODEL)})
        cores = sorted(os.sched_getaffinity(0))
        extra = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        extra |= for_nccl("engine", 0) if self._gpu else {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
        command = [*server_command(config), "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--worker-extension-cls", "fault_worker.FaultyWorker"]
        self.log = Path(self._folder.name) / f"server-{self.starts}.log"
        self.starts += 1
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | extra
            )
        deadline = time.monotonic() + 240
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.3)
        replies = self.rpc("r3_test_arm", [], timeout_s=60)
        self.workers = {reply["rank"]: reply["pid"] for reply in replies}
        self.processes = len(session(self.process.pid))

    def stop(self) -> None:
        for pid in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.left = [] if all_ended(self.process.pid, 5.0) else session(self.process.pid)
        self.left = [p + " " + _command(p) for p in self.left]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.stop()
        self._client.close()
        self._folder.cleanup()

    def healthy(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("/health", timeout=5).status_code == 200
        return False

    def rpc(self, method: str, *args: Any, timeout_s: float) -> list[dict[str, Any]]:
        response = self._client.post("/collective_rpc", json={"method": method, "args": args}, timeout=timeout_s)
        response.raise_for_status()
        return response.json()["results"]

    def serves(self, which: int) -> Output | None:
        """What it answers; None if it is paused, or gone. A busy machine may take long, and that is no pause."""
        answer = self.ask(which, timeout_s=QUIET_S)
        if answer is not None or self._paused():
            return answer
        return self.ask(which, timeout_s=60.0)

    def _paused(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            response = self._client.get("/is_paused", timeout=10.0)
            return response.status_code != 200 or response.json()["is_paused"]
        return True

    def ask(self, which: int, tokens: int = TOKENS, *, timeout_s: float) -> Output | None:
        """Greedy tokens and their log-probabilities; None if there is no answer within `timeout_s`, or an error."""
        body = {
            "model": str(DEMO_MODEL),
            "prompt": self._prompts[which],
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }
        try:
            response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)
        except httpx.TransportError:
            return None
        if response.status_code != 200:
            return None
        logprobs = response.json()["choices"][0]["logprobs"]
        if logprobs is None:
            return ()
        return tuple(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


class Load:
    """One completion after the other, one at a time: results depend on what shares a batch."""

    def __init__(self, server: FaultyServer) -> None:
        self.outputs: list[tuple[int, Output]] = []
        self.unanswered = 0
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        turn = 0
        while not self._stop.is_set():
            output = self._server.ask(turn % 2, LONG, timeout_s=1.5)
            if output is None:
                self.unanswered += 1
                time.sleep(0.05)
            else:
                self.outputs.append((turn % 2, output))
            turn += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def state(pid: int) -> str:
    """Of a process, as in /proc: "T" if it is stopped, "" if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    found = text.rpartition(")")[2].split()[0]
    return "" if found in "ZX" else found


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    return []


def open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def _command(process: str) -> str:
    found = re.search(r"pid=(\d+)", process)
    with contextlib.suppress(OSError, AttributeError):
        return Path(f"/proc/{found[1]}/cmdline").read_text().replace("\0", " ")[-200:]
    return ""


if __name__ == "__main__":
    sys.exit("imported by fault_harness")
