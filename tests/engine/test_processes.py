"""The main job as a user starts it: what it leaves in the run folder, and that it leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from models import tiny_dense
from places import DEMO_MODEL
from processes import all_ended, session

from r3.diagnostics.metric import without_layer
from r3.diagnostics.registry import declared, is_declared

EXAMPLE = DEMO_MODEL.parent / "grpo_demo.py"
SMALL = ["trainer.train_batch_size=4", "trainer.updates_per_step=1", "generator.sampling_params.max_generate_length=24"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(*overrides: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", *launcher, str(EXAMPLE), *SMALL, *overrides]
    # A session of its own: a signal to it does not reach the tests, and its processes can be told from others.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests run as a shell's background job, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.engine
def test_a_run_without_replay_trains_on_live_routing_and_ends_cleanly(tmp_path):
    run = start(
        # In one process with its engine, which must leave it the process group: the policy is saved after the engine.
        "generator.inference_engine.weight_sync.transport=in_process",
        f"trainer.output_dir={tmp_path / 'run'}",
        "trainer.max_steps=2",
        "trainer.policy.fsdp_config.moe_enable_routing_replay=false",
        # What is recorded only if it is asked for.
        "trainer.algorithm.correction=tis",
        "trainer.algorithm.correction_level=sequence",
        "trainer.algorithm.kl_coef=0.01",
        "trainer.eval_every=1",
        "trainer.eval_batch_size=4",
    )
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert all_ended(run.pid), session(run.pid)
    assert "times lower" in output
    steps = records(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["routing/rows_replayed"] == 0 < step["routing/rows_live"]
        assert step["sync/version"] == step["step"]
        # Capture stays on: what replay would do is measured all the same.
        assert 0 < step["logprob_diff/replayed/k3"] != step["logprob_diff/live/k3"] > 0
        assert step["sync/chunks"] > 1
        assert {f"routing/differing_rows/layer_{layer:02d}" for layer in range(8)} <= step.keys()
        assert {key for key in step if not is_declared(key)} == {"step"}
    # The first step has the engine's check as well: all that is declared is recorded, and the other way round.
    elsewhere = ("correction/masked_frac", "correction/seq_masked_frac", "rollout/set_", "routing/rank_load")
    known = {"step", *(key for _, keys in declared() for key in keys if not key.startswith(elsewhere))}
    assert {without_layer(key) for key in steps[0]} == known
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["trainer.policy.fsdp_config.moe_enable_routing_replay"] is False


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one rank", "two ranks"])
def test_a_run_that_was_killed_goes_on_in_its_folder_with_the_engine_at_its_weights(tmp_path, launcher):
    folder = tmp_path / "run"
    settings = [f"trainer.output_dir={folder}", "trainer.save_every=1", "trainer.resume_from=auto"]
    run = start(*settings, "trainer.max_steps=40", launcher=launcher)
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / "step-000002" / "run.json").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    leader = psutil.Process(run.pid)
    for process in [leader, *leader.children(recursive=True)]:
        process.kill()
    run.communicate()
    done = max(int(path.name[-6:]) for path in (folder / "checkpoints").glob("step-??????"))
    before = records(folder)[:done]

    run = start(*settings, f"trainer.max_steps={done + 2}", launcher=launcher)
    output, _ = run.communicate(timeout=280)
    assert run.returncode == 0, output
    steps = records(folder)
    assert [step["step"] for step in steps] == list(range(1, done + 3))
    assert steps[:done] == before
    assert [step["sync/version"] for step in steps[done:]] == [done + 1, done + 2]
    for step in steps[done:]:  # rollouts of other weights than the trainer's would be far off
        assert step["logprob_diff/replayed/k3"] < 3 * max(each["logprob_diff/replayed/k3"] for each in before)
    assert (folder / "policy" / "model.safetensors").exists()


@pytest.mark.engine
@pytest.mark.long
def test_two_ranks_that_share_each_row_train_with_replay_and_sync(tmp_path):
    run = start(
        f"trainer.output_dir={tmp_path / 'run'}",
        "trainer.max_steps=2",
        "trainer.policy.sequence_parallel_size=2",
        launcher=TORCHRUN,
    )
    output, _ = run.communicate(timeout=280)
    assert run.returncode == 0, output
    assert all_ended(run.pid), session(run.pid)
    assert output.count("times lower") == 1
    steps = records(tmp_path / "run")
    assert [step["sync/version"] for step in steps] == [1, 2]
    for step in steps:
        # Every sampled token of 4 prompts x 8 rollouts counts once, whichever rank had it.
        assert step["logprob_diff/replayed/tokens"] == step["rollout/tokens_mean"] * 32
        # The last token of a rollout has no row; all others are replayed.
        assert step["routing/rows_live"] == 32
        assert step["logprob_diff/replayed/k3"] < step["logprob_diff/live/k3"]


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_engine_too(tmp_path, sent, code):
    run = start(f"trainer.output_dir={tmp_path / 'run'}", "trainer.max_steps=1000")
    try:
        deadline = time.monotonic() + 200
        while not records(tmp_path / "run") and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.5)
        assert records(tmp_path / "run"), "no step within 200 s"
        assert len(session(run.pid)) > 1, "the engine has no process of its own: nothing is tested"
        run.send_signal(sent)
        run.communicate(timeout=60)
        assert run.returncode == code
        assert all_ended(run.pid), session(run.pid)
    finally:
        if session(run.pid):
            os.killpg(run.pid, signal.SIGKILL)


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading, time
from r3 import R3Config
from r3.capture import running_engine

def engines():
    return [each for each in multiprocessing.active_children() if each.name.startswith("EngineCore")]

def interrupted(to, sent):
    def send():
        while not engines():
            time.sleep(0.05)
        to(os.getpid(), sent)

    threading.Thread(target=send, daemon=True).start()
    with running_engine(R3Config.from_overrides([], {"trainer.policy.model.path": sys.argv[1]})):
        print("the engine is up", flush=True)

if __name__ == "__main__":
    for to, sent in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)):
        before = signal.getsignal(sent)
        try:
            interrupted(to, sent)
        except (KeyboardInterrupt, SystemExit) as ended:
            print(type(ended).__name__, *ended.args, "left:", engines(), flush=True)
        assert signal.getsignal(sent) is before
    try:
        interrupted(os.kill, signal.SIGINT)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.engine
@pytest.mark.long
def test_ctrl_c_and_sigterm_end_the_start_of_an_engine(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(DEMO_MODEL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        output, _ = run.communicate(timeout=120)
        assert "SystemExit 143 left: []" in output
        assert "KeyboardInterrupt left: []" in output
        assert "the engine is up" not in output
        assert run.returncode == 130
        assert all_ended(run.pid), session(run.pid)
    finally:
        if session(run.pid):
            os.killpg(run.pid, signal.SIGKILL)


RAISES = """
import sys
from r3 import R3Config
from r3.capture import running_engine

if __name__ == "__main__":
    with running_engine(R3Config.from_overrides([], {"trainer.policy.model.path": sys.argv[1]})):
        raise LookupError("after the engine is up")
"""


@pytest.mark.engine
@pytest.mark.long
def test_an_exception_ends_the_engine_too(tmp_path):
    script = tmp_path / "raises.py"
    script.write_text(RAISES)
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(DEMO_MODEL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = run.communicate(timeout=240)
    assert "LookupError: after the engine is up" in output
    assert run.returncode == 1
    assert all_ended(run.pid), session(run.pid)


def test_settings_that_ranks_cannot_share_are_refused_before_anything_starts(tmp_path):
    run = start(f"trainer.output_dir={tmp_path / 'run'}", "trainer.policy.sequence_parallel_size=3", launcher=TORCHRUN)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "expected a divisor of the 2 ranks, got 3" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.inference_engine.enable_return_routed_experts=false", "needs generator.inference_engine"),
        ("trainer.no_such_thing=1", "unknown setting 'trainer.no_such_thing'"),
    ],
)
def test_settings_that_cannot_work_end_the_run_before_anything_starts(tmp_path, override, message):
    run = start(f"trainer.output_dir={tmp_path / 'run'}", override)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_dense_model_is_refused_before_the_engine_starts(tmp_path):
    from transformers import AutoTokenizer

    tiny_dense().save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "dense")
    run = start(f"trainer.output_dir={tmp_path / 'run'}", f"trainer.policy.model.path={tmp_path / 'dense'}")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "UnsupportedModelError: Qwen3ForCausalLM has no router" in output
