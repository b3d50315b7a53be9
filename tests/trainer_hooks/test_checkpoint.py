"""A run that goes on from a checkpoint is the one that did not stop, to the last bit; and its policy can be loaded."""

import logging
import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_steps import ADVANTAGES, Tensors, full, plain_model, save_checkpoint, settings
from ranks import Ranks

import r3
from r3.diagnostics import RunFolder, read_metrics
from trainer_hooks import checkpoint, export
from trainer_hooks.batches import StepBatch
from trainer_hooks.grpo import GRPOTrainer
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy

# Everything that has a state: moments, a schedule, old log-probabilities, a reference.
RUN = {
    "trainer.max_steps": 4,
    "trainer.save_every": 2,
    "trainer.updates_per_step": 2,
    "trainer.algorithm.correction": "tis",
    "trainer.algorithm.kl_coef": 0.1,
    "trainer.policy.optimizer_config.scheduler": "cosine",
    "trainer.policy.optimizer_config.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = save_checkpoint(tmp_path_factory.mktemp("model"))
    (made / "generation_config.json").write_text('{"eos_token_id": 1}')
    return made


class Fixed(GRPOTrainer):
    """Its rollouts are given, its advantages drawn anew at each step, and it has no engine."""

    def __init__(self, config: Any, policy: Policy, batch: Any) -> None:
        super().__init__(config, None, policy, None)
        self.batch, self.events, self.log = batch, [], self

    def step(self, step: int, ahead: Any = None) -> Any:
        drawn = ADVANTAGES * (1 + random.random() + torch.rand(4))
        return self.update(StepBatch.of(self.batch, drawn)), None

    def push(self, version: int) -> None:
        self.events.append(("sync", version))

    def add(self, step: int, metrics: dict[str, float], details: Any) -> None:
        self.events.append((step, metrics))


def run(config: Any, batch: Any, folder: Path, resume_from: Path | None = None) -> tuple[list[Any], Tensors]:
    """What happened, and the weights at the end. Every rank calls it."""
    random.seed(11 if resume_from is None else 12)
    torch.manual_seed(11 if resume_from is None else 12)
    with process_group():
        trainer = Fixed(config, Policy(config), batch)
        trainer.train(run_folder=folder, resume_from=resume_from)
        return trainer.events, full(trainer.policy.model.named_parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(path, batch, two, tmp_path, ranks):
    config = settings(path, **RUN)
    both = (lambda *args: [run(*args)]) if ranks == 1 else partial(two.all, run)
    whole = both(config, batch, tmp_path)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["step-000002", "step-000004"]
    resumed = both(config, batch, tmp_path / "other", tmp_path / checkpoint.FOLDER / "step-000002")
    for (events, weights), (events_after, weights_after) in zip(whole, resumed, strict=True):
        assert [step for step, _ in events] == [1, 2, 3, 4]
        assert events_after == [("sync", 2), *events[2:]], "the engine has the weights before the first step"
        assert events[1][1]["train/loss"] != events[2][1]["train/loss"]
        for name, weight in weights.items():
            assert torch.equal(weights_after[name], weight), name
    # A run that is done does nothing more.
    done = both(config, batch, tmp_path / "done", tmp_path / checkpoint.FOLDER / "step-000004")
    assert [events for events, _ in done] == [[("sync", 4)]] * ranks


def test_other_ranks_go_on_nearly_alike_and_say_so(path, batch, two, tmp_path, caplog):
    config = settings(path, **RUN)
    (events, _), _ = two.all(run, config, batch, tmp_path)
    with caplog.at_level(logging.WARNING, logger="r3"):
        resumed, _ = run(config, batch, tmp_path / "other", checkpoint.newest(tmp_path).with_name("step-000002"))
    assert "saved by 2 ranks and is loaded by 1" in caplog.text
    assert resumed[-1][1]["train/loss"] == pytest.approx(events[-1][1]["train/loss"], rel=1e-3)


def end_at_the_rename(config: Any, batch: Any, folder: Path) -> None:
    rename = Path.rename
    kill = lambda self, target: os.kill(os.getpid(), signal.SIGKILL) if "4" in self.name else rename(self, target)
    Path.rename = kill  # type: ignore[method-assign]
    run(config, batch, folder)


def test_a_run_that_is_killed_in_a_save_goes_on_from_the_one_before(path, batch, tmp_path):
    config = settings(path, **RUN)
    process = multiprocessing.get_context("spawn").Process(target=end_at_the_rename, args=(config, batch, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir())
    assert names == ["step-000002", "step-000004.partial"]
    before = checkpoint.newest(tmp_path)
    assert before is not None
    assert before.name == "step-000002"
    events, _ = run(config, batch, tmp_path, before)
    assert [step for step, _ in events] == ["sync", 3, 4]
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 4
    assert not list((tmp_path / checkpoint.FOLDER).glob("*.partial"))


def test_only_the_newest_are_kept(path, batch, tmp_path):
    changes = {"trainer.max_steps": 4, "trainer.save_every": 1, "trainer.keep_checkpoints": 2}
    run(settings(path, **changes), batch, tmp_path)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["step-000003", "step-000004"]


def test_other_settings_are_refused_where_they_mean_another_run(path, batch, tmp_path):
    run(settings(path, **RUN, **{"trainer.policy.optimizer_config.lr": 1e-4}), batch, tmp_path)
    saved = checkpoint.newest(tmp_path)
    with process_group():
        policy = Policy(settings(path, **RUN))
        with pytest.raises(r3.ConfigError, match=r"lr: expected 0.0001, got 0.001\n") as refused:
            checkpoint.load(saved, settings(path, **RUN), policy)
        assert "start a new run from its exported policy" in str(refused.value)
        same = {**RUN, "trainer.policy.optimizer_config.lr": 1e-4}
        # The schedule depends on it.
        with pytest.raises(r3.ConfigError, match="max_steps: expected 4, got 8"):
            checkpoint.load(saved, settings(path, **same | {"trainer.max_steps": 8}), policy)
        free = {"trainer.micro_train_batch_size": 1, "trainer.save_every": 3, "trainer.eval_every": 2}
        assert checkpoint.load(saved, settings(path, **same | free), policy) == 4


def test_a_longer_run_of_a_constant_rate_goes_on(path, batch, tmp_path):
    run(settings(path, **{"trainer.max_steps": 1, "trainer.save_every": 1}), batch, tmp_path)
    events, _ = run(settings(path, **{"trainer.max_steps": 2}), batch, tmp_path, checkpoint.newest(tmp_path))
    assert [step for step, _ in events] == ["sync", 2]


def test_what_to_resume_from_is_found_or_refused(path, tmp_path):
    def chosen(text: str) -> Any:
        pairs = {"trainer.resume_from": text, "trainer.output_dir": tmp_path, "trainer.save_every": 1}
        return checkpoint.chosen(settings(path, **pairs), tmp_path)

    assert chosen("auto") is None
    with pytest.raises(r3.ConfigError, match=r"expected a checkpoint \(a folder with run.json\)"):
        chosen(str(tmp_path))
    for step in (9, 10):
        made = tmp_path / checkpoint.FOLDER / f"step-{step:06d}"
        made.mkdir(parents=True)
        (made / checkpoint.RUN_FILE).touch()
    assert chosen("auto") == chosen(str(tmp_path)) == made
    assert chosen(str(made.with_name("step-000009"))).name == "step-000009"
    assert chosen("''") is None
    for pairs in (["resume_from=auto"], ["keep_checkpoints=1"], ["resume_from=auto", "output_dir=x"]):
        with pytest.raises(r3.ConfigError, match="save_every above 0"):
            r3.R3Config.from_overrides([f"trainer.{pair}" for pair in pairs])


def test_the_run_folder_forgets_what_came_after_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})
    for step in (1, 2, 3):
        folder.log(step, {"x": step / 3})
        folder.log_details(step, {"tokens": [step]})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "x"')  # the line at which it was killed
    again = RunFolder.reopen(folder.path, {"a": 2}, step=2)
    again.log(3, {"x": 0.5})
    assert read_metrics(again.path) == [{"step": 1, "x": 1 / 3}, {"step": 2, "x": 2 / 3}, {"step": 3, "x": 0.5}]
    assert r3.diagnostics.read_settings(again.path) == {"a": 2}
    assert [record["step"] for record in r3.diagnostics.read_details(again.path)] == [1, 2]
    with pytest.raises(r3.DiagnosticsError, match=r"settings.json"):
        RunFolder.reopen(tmp_path, {}, step=1)


def exported(config: Any, batch: Any, folder: Path, shard_bytes: int) -> tuple[Tensors, list[str]]:
    export.SHARD_BYTES = shard_bytes
    with process_group():
        policy = Policy(config)
        Fixed(config, policy, batch).train()
        export.export_policy(policy, config.trainer.policy.model.path, folder)
        return full(policy.model.named_parameters()), sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_exported_policy_is_the_trained_one_by_its_own_names(path, batch, two, tmp_path, ranks, shard_bytes):
    from safetensors.torch import load_file

    config = settings(path, **{"trainer.max_steps": 1})
    folder = tmp_path / "policy"
    args = (config, batch, folder, shard_bytes)
    weights, names = exported(*args) if ranks == 1 else two.all(exported, *args)[0]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(names)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert shards == ["model.safetensors"] if shard_bytes == 2**30 else len(shards) > 3
    original = load_file(path / "model.safetensors")
    found: Tensors = {}
    for name in shards:
        found |= load_file(folder / name)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    model = plain_model(folder)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), weights[name], rtol=0, atol=0)


def export_to_a_full_disk(config: Any, folder: Path) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    export.SHARD_BYTES, export.save_file = 20_000, full_disk
    with process_group():
        policy = Policy(config)
        export.export_policy(policy, config.trainer.policy.model.path, folder)


def test_no_rank_waits_for_one_that_cannot_write(path, tmp_path):
    ranks = Ranks(2)
    try:
        first, second = ranks.run(export_to_a_full_disk, settings(path), tmp_path / "policy", timeout_s=60)
    finally:
        ranks.close()
    assert isinstance(first, OSError)
    assert "rank 0: OSError: no space left" in str(second)
    assert not (tmp_path / "policy").exists()
