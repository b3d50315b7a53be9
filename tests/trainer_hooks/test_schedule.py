"""The learning rate by step, against its formula, and what the optimizer is given."""

import math
import warnings

import pytest
import torch
from learning_steps import ADVANTAGES, LR, learn, make_rollouts, save_checkpoint, settings

import r3
from trainer_hooks.schedule import lr_schedule

OPTIMIZER = "trainer.policy.optimizer_config"


def formula(kind, warmup, steps, k):
    if k < warmup:
        return LR * (k + 1) / (warmup + 1)
    x = (k - warmup) / (steps - warmup)
    return LR * {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 12), (1, 2), (5, 12), (11, 12), (100, 1000)])
def test_each_step_has_the_rate_of_the_formula(kind, warmup, steps):
    found = r3.R3Config.from_overrides(
        [f"trainer.max_steps={steps}", f"{OPTIMIZER}.scheduler={kind}", f"{OPTIMIZER}.warmup_steps={warmup}"]
    ).trainer.policy.optimizer_config
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = lr_schedule(optimizer, found, max_steps=steps)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx([formula(kind, warmup, steps, k) for k in range(steps)], rel=1e-9)
    assert min(rates) > 0


def test_all_updates_of_a_step_have_its_rate_and_it_is_recorded(tmp_path):
    path = save_checkpoint(tmp_path)
    batch = make_rollouts(path)
    changes = {f"{OPTIMIZER}.scheduler": "linear", f"{OPTIMIZER}.warmup_steps": 1, "trainer.max_steps": 3}
    # Without decay and with these betas, the first step of AdamW is of the size of the rate.
    trace = learn(settings(path, **changes, **{"trainer.updates_per_step": 2}), batch, ADVANTAGES, calls=3)
    rates = [formula("linear", 1, 3, k) for k in range(3)]
    assert [metrics["train/lr"] for metrics in trace.metrics] == pytest.approx(rates)
    moved = max(float((trace.weights[1][n] - w).abs().max()) for n, w in trace.weights[0].items())
    assert moved == pytest.approx(rates[0], rel=0.1)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(r3.ConfigError, match=r"warmup_steps: expected fewer than trainer.max_steps \(12\), got 12"):
        r3.R3Config.from_overrides([f"{OPTIMIZER}.warmup_steps=12"])
