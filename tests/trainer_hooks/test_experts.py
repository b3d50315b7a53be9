"""The experts function that the settings name is the one that trains, and changes no gradient."""

import pytest
import torch
from learning_steps import ADVANTAGES, formula, learn, settings

from r3.experts import NAME
from r3.experts.fit import expert_layers
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy

EXPERTS = "trainer.policy.model.experts_implementation"


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("auto", NAME),
        ("grouped_mm", "grouped_mm"),
        (NAME, NAME),
        ("eager", "eager"),
    ],
)
def test_the_experts_function_of_the_settings_trains(path, batch, asked, used):
    config = settings(path, **{EXPERTS: asked, "trainer.algorithm.kl_coef": 0.1})
    with process_group():
        policy = Policy(config)
        for model in (policy.model, policy.reference):
            assert {layer.config._experts_implementation for _, layer in expert_layers(model)} == {used}
    trace = learn(settings(path, **{EXPERTS: asked}), batch, ADVANTAGES)
    exact = formula(path, trace.weights[0], batch, ADVANTAGES, range(4))
    for name, gradient in exact.gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(trace.gradients[0][name], gradient, rtol=0, atol=2e-4 * largest + 1e-9, msg=name)
