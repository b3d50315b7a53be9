"""r3's own trainer with a pool of engines that it starts, or that run already."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from places import DEMO_MODEL
from pool_servers import pool_servers

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

EXAMPLE = DEMO_MODEL.parent / "grpo_demo.py"
SMALL = [
    *("trainer.train_batch_size=8", "trainer.updates_per_step=1", "trainer.max_steps=2", "trainer.eval_every=2"),
    *("trainer.eval_batch_size=4", "generator.sampling_params.max_generate_length=24"),
    "generator.inference_engine.kv_cache_gib=0.2",
]


class Run:
    """The demo in a process, all of whose descendants can be found by what they have inherited."""

    def __init__(self, *overrides: str) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(EXAMPLE), *SMALL, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"R3_TEST_RUN": self._mark},
        )

    def descendants(self) -> list[str]:
        return [each for path in Path("/proc").glob("[0-9]*") if (each := self._command(path))]

    def _command(self, process: Path) -> str:
        with contextlib.suppress(OSError):
            if self._mark.encode() in (process / "environ").read_bytes():
                return (process / "cmdline").read_text().replace("\0", " ")[:200]
        return ""

    def all_ended(self, within_s: float) -> list[str]:
        until = time.monotonic() + within_s
        while (left := self.descendants()) and time.monotonic() < until:
            time.sleep(0.2)
        return left


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_trainer_starts_two_engines_and_ends_them(tmp_path):
    run = Run("generator.inference_engine.num_engines=2", f"trainer.output_dir={tmp_path / 'run'}")
    output, _ = run.process.communicate(timeout=500)
    assert run.process.returncode == 0, output
    assert not run.all_ended(20)
    steps = steps_of(tmp_path / "run")
    assert [step["sync/version"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 < step["logprob_diff/replayed/k3"] < step["logprob_diff/live/k3"]
        assert step["routing/rows_replayed"] > 0
    assert "eval/reward" in steps[-1]


def test_engines_end_with_a_trainer_that_is_killed(tmp_path):
    run = Run("generator.inference_engine.num_engines=2", f"trainer.output_dir={tmp_path / 'run'}")
    until = time.monotonic() + 200
    while sum("api_server" in process for process in run.descendants()) < 2:
        assert run.process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.5)
    time.sleep(5.0)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.communicate()
    assert not run.all_ended(60)


def test_the_trainer_samples_with_servers_that_run_already(tmp_path):
    with pool_servers(2, "generator.inference_engine.max_num_seqs=256") as servers:
        addresses = ",".join(server.url for server in servers)
        run = Run(
            f"generator.inference_engine.addresses=[{addresses}]",
            "generator.inference_engine.weight_sync.transport=gloo",
            f"trainer.output_dir={tmp_path / 'run'}",
        )
        output, _ = run.process.communicate(timeout=400)
        assert run.process.returncode == 0, output
        assert all(server.healthy() for server in servers)
        again = Run(f"generator.inference_engine.addresses=[{addresses}]", f"trainer.output_dir={tmp_path / 'again'}")
        output, _ = again.process.communicate(timeout=200)
        assert again.process.returncode != 0
        assert "got version 2 of an earlier run" in output
    assert [step["sync/version"] for step in steps_of(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("on_running", ["wait", "keep", "abort"])
def test_the_trainer_samples_the_next_step_while_one_trains(tmp_path, on_running):
    with pool_servers(2, "generator.inference_engine.max_num_seqs=256") as servers:
        addresses = ",".join(server.url for server in servers)
        run = Run(
            f"generator.inference_engine.addresses=[{addresses}]",
            f"generator.inference_engine.weight_sync.on_running={on_running}",
            f"trainer.output_dir={tmp_path / 'run'}",
            "trainer.max_staleness=1",
            "trainer.max_steps=4",
        )
        output, _ = run.process.communicate(timeout=400)
        assert run.process.returncode == 0, output
    steps = steps_of(tmp_path / "run")
    assert [step["sync/version"] for step in steps] == [1, 2, 3, 4]
    assert all(step["routing/version_lag_max"] <= 1 for step in steps)
    assert all(step["logprob_diff/replayed/k3"] < step["logprob_diff/live/k3"] for step in steps)
