"""`trainer.policy.expert_parallel_size`: the same run as without it, and what it does not go together with."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_steps import ADVANTAGES, CASE, settings
from ranks import Ranks

import r3
from r3.releases import has_right_expert_parallelism
from r3.weight_sync import gathered
from trainer_hooks import checkpoint
from trainer_hooks.batches import StepBatch
from trainer_hooks.grpo import GRPOTrainer
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy

EXPERTS, SLICES = "trainer.policy.expert_parallel_size", "trainer.policy.sequence_parallel_size"
# Of rollouts whose ratios lie at the bound.
AT_A_BOUND = [f"logprob_diff/{side}/extreme_frac" for side in ("live", "replayed")]
RUN = {"trainer.max_steps": 4, "trainer.save_every": 2, "trainer.policy.optimizer_config.max_grad_norm": 0.5}

needs_right_experts = pytest.mark.skipif(
    not has_right_expert_parallelism(), reason="the trainer refuses it with this transformers"
)


@pytest.fixture(scope="module")
def four():
    with contextlib.closing(Ranks(4)) as ranks:
        yield ranks


class Fixed(GRPOTrainer):
    """Its rollouts are given, it has no engine, and it measures every step."""

    def __init__(self, config: Any, policy: Policy, batch: Any) -> None:
        super().__init__(config, None, policy, None)
        self.batch, self.events, self.log = StepBatch.of(batch, ADVANTAGES), [], self

    def step(self, step: int, ahead: Any = None) -> Any:
        return self.measure(self.batch).metrics | self.update(self.batch), None

    def push(self, version: int) -> None:
        pass

    def add(self, step: int, metrics: dict[str, float], details: Any) -> None:
        self.events.append(metrics)


def run(config: Any, batch: Any, folder: Path, resume_from: Path | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Metrics of the steps, and the weights at the end. Every rank calls it."""
    with process_group():
        trainer = Fixed(config, Policy(config), batch)
        trainer.train(run_folder=folder, resume_from=resume_from)
        return trainer.events, {name: gathered(source) for name, source in trainer.policy.named_weights()}


def require_close(found, expected, size):
    (events, weights), (events_alone, weights_alone) = found, expected
    for metrics, alone in zip(events, events_alone, strict=True):
        for name in alone.keys() - set(AT_A_BOUND):
            value = alone[name]
            assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-5, nan_ok=True), name
    for metrics in events:
        for side in ("live", "rollout"):
            layers = [metrics[f"routing/rank_load/{side}/layer_{layer:02d}"] for layer in CASE.router_layers]
            assert 1 <= max(layers) == metrics[f"routing/rank_load_max/{side}"] <= size
    assert weights.keys() == weights_alone.keys()
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@needs_right_experts
@pytest.mark.parametrize(
    ("size", "slices"), [(2, 2), *(pytest.param(*one, marks=pytest.mark.long) for one in ((2, 1), (4, 1), (4, 2)))]
)
def test_a_run_is_the_one_without_expert_parallelism_and_can_be_resumed(path, batch, four, tmp_path, size, slices):
    alone = run(settings(path, **RUN), batch, tmp_path / "alone")
    config = settings(path, **RUN, **{EXPERTS: size, SLICES: slices})
    whole = four.all(run, config, batch, tmp_path / "whole")
    require_close(whole[0], alone, size)
    resumed = four.all(
        run, config, batch, tmp_path / "rest", checkpoint.newest(tmp_path / "whole").with_name("step-000002")
    )
    assert resumed[0][0] == whole[0][0][2:]
    for name, weight in whole[0][1].items():
        assert torch.equal(resumed[0][1][name], weight), name
    # Its checkpoint has each part in its place: ranks that share the experts in another way read it too.
    other = settings(path, **RUN, **{EXPERTS: 4 if size == 2 else 2})
    _, weights = four.all(run, other, batch, tmp_path / "other", tmp_path / "whole" / "checkpoints" / "step-000002")[0]
    for name, weight in whole[0][1].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@needs_right_experts
@pytest.mark.long
def test_bfloat16_trains(path, batch, four, tmp_path):
    low = {"trainer.policy.fsdp_config.param_dtype": "bfloat16", "trainer.max_steps": 1, EXPERTS: 2}
    ((metrics,), _), *_ = four.all(run, settings(path, **(RUN | low)), batch, tmp_path)
    assert 0 < metrics["train/grad_norm"] < 100
    assert 0 < metrics["logprob_diff/replayed/abs_mean"] < 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({EXPERTS: 3}, r"expert_parallel_size: expected a divisor of the 4 ranks, got 3"),
        (
            {EXPERTS: 2, "trainer.policy.fsdp_config.param_dtype": "float16"},
            "expert_parallel_size above 1 needs .*param_dtype=bfloat16 or float32",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(path, pairs, message):
    with pytest.raises(r3.ConfigError, match=message):
        settings(path, **pairs).check(ranks=4)
