"""A Ray cluster of several nodes on this machine, each in a network namespace with an address of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from network_hosts import Hosts
from places import DEMO_MODEL

EXAMPLE = DEMO_MODEL.parent / "grpo_ray.py"
PORT = 6379
SMALL = [
    *("trainer.train_batch_size=8", "trainer.updates_per_step=1"),
    *("generator.sampling_params.max_generate_length=24", "generator.inference_engine.kv_cache_gib=0.2"),
    *("generator.inference_engine.weight_sync.timeout_s=60", "generator.inference_engine.request_timeout_s=120"),
    "trainer.save_hf=false",
]
CALM = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # Ray's own is 15, which other tests at the same time would starve
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}


class Marked:
    """Processes, found by a variable that all of them have inherited from the first."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = CALM | {"R3_TEST_MARK": self.mark}

    def processes(self, word: str = "") -> dict[int, str]:
        """Command lines with `word` in them, by process id."""
        found = {int(path.name): command for path in Path("/proc").glob("[0-9]*") if (command := self._command(path))}
        return {pid: command for pid, command in found.items() if word in command}

    def kill(self) -> None:
        """All at once, as a machine that goes down ends them."""
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _command(self, process: Path) -> str:
        with contextlib.suppress(OSError):
            if self.mark.encode() in (process / "environ").read_bytes():
                return (process / "cmdline").read_text().replace("\0", " ").strip()[:200]
        return ""


class Run(Marked):
    """The example in a process, whose output goes to a file: a pipe would be full before a test reads it."""

    def __init__(self, prefix: Sequence[str], *arguments: str) -> None:
        super().__init__()
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "ignore", str(EXAMPLE), *SMALL, *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | self.environment,
        )

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text(errors="replace")

    def wait_for(self, condition: Callable[[], Any], what: str, within_s: float = 500.0) -> Any:
        """What `condition` returns once it is true. The run must not end before."""
        until = time.monotonic() + within_s
        while not (found := condition()):
            code = self.process.poll()
            assert code is None, f"the run has ended ({code}) before {what}:\n{self.output}"
            assert time.monotonic() < until, f"not within {within_s:g} s: {what}\n{self.output}"
            time.sleep(0.2)
        return found

    def ended(self, within_s: float = 600.0) -> int:
        """Its return code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(within_s)
        raise AssertionError(f"the run has not ended within {within_s:g} s:\n{self.output}")


class RayNodes:
    """`cpus[i]` CPUs on node i; the first is the head, on which drivers run. A context manager."""

    def __init__(self, *cpus: int) -> None:
        self._hosts = Hosts(len(cpus))
        self._cpus = cpus
        self._folder = tempfile.mkdtemp(prefix="r3ray")  # short, since the paths of sockets are
        self.nodes = [Marked() for _ in cpus]
        self.drivers: list[Run] = []

    @property
    def address(self) -> str:
        return f"{self._hosts.addresses[0]}:{PORT}"

    def __enter__(self) -> "RayNodes":
        self._hosts.__enter__()
        try:
            for number, (node, cpus) in enumerate(zip(self.nodes, self._cpus, strict=True)):
                more = ["--head", f"--port={PORT}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
                ray = [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start"),
                    *(more if number == 0 else [f"--address={self.address}"]),
                    *(f"--node-ip-address={self._hosts.addresses[number]}", f"--num-cpus={cpus}"),
                    *("--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"),
                ]
                started = self._hosts.start(number, ray, **node.environment)
                output, _ = started.communicate(timeout=120)
                assert started.returncode == 0, output
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for each in (*self.drivers, *self.nodes):
            each.kill()
        self._hosts.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, *arguments: str) -> "Run":
        """The example on the head; it joins the cluster."""
        run = Run(self._hosts.command(0, []), f"--address={self.address}", *arguments)
        self.drivers.append(run)
        return run

    def of_the_run(self) -> dict[int, str]:
        """What is on the nodes of a run: trainer ranks, engines and their servers."""
        words = ("RayTrainWorker", "TrainController", "EngineServer", "api_server", "vllm", "VLLM", "EngineCore")
        found = {pid: command for node in self.nodes for pid, command in node.processes().items()}
        return {pid: command for pid, command in found.items() if any(word in command for word in words)}

    def having(self, word: str) -> list[int]:
        """Numbers of the nodes on which a process has `word` in its command line."""
        return [number for number, node in enumerate(self.nodes) if node.processes(word)]


def soon(condition: Callable[[], Any], within_s: float = 30.0) -> bool:
    """Whether `condition` comes true."""
    until = time.monotonic() + within_s
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.2)
    return bool(found)
