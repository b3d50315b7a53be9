"""The KL to the starting checkpoint: its value, its gradient, and the reference, which stays as it was."""

import logging
from typing import Any

import pytest
import torch
from learning_steps import (
    ADVANTAGES,
    HIGH,
    LOW,
    full,
    learn,
    plain_model,
    sampled_logprobs,
    settings,
)

from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.launch import process_group
from trainer_hooks.objective import kl_to_reference
from trainer_hooks.policy import Policy
from trainer_hooks.update import update

COEF = 0.3
KL = {"trainer.algorithm.kl_coef": COEF}
UPDATES = "trainer.updates_per_step"
MICRO = "trainer.micro_train_batch_size"
CORRECTION = "trainer.algorithm.correction"


def truth(path, state, batch, rollouts, *, by_sequence):
    """The gradients of one update, and the KL of each of its tokens: the policy replayed, the reference live."""
    model, reference = plain_model(path, state), plain_model(path)
    terms, kls = [], []
    for b in rollouts:
        advantage, sampled = float(ADVANTAGES[b]), batch.logprobs[b][batch.response_mask[b]].double()
        new = sampled_logprobs(model, batch, b)
        with torch.no_grad():
            old = sampled_logprobs(reference, batch, b, replayed=False)
        ratio = (new - sampled).mean().exp().expand(new.shape) if by_sequence else (new - sampled).exp()
        objective = advantage * (ratio.clamp(max=1 + HIGH) if advantage > 0 else ratio.clamp(min=1 - LOW))
        kl = (old - new).exp() - (old - new) - 1
        terms.append((COEF * kl - objective).mean()[None] if by_sequence else COEF * kl - objective)
        kls.append(kl.detach())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(torch.cat(terms).mean(), parameters)
    return dict(zip(names, gradients, strict=True)), torch.cat(kls)


def require(trace, path, batch, *, by_sequence=False):
    kls = []
    for at, rollouts in enumerate([[0, 1], [2, 3]]):
        gradients, kl = truth(path, trace.weights[at], batch, rollouts, by_sequence=by_sequence)
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())
            assert torch.allclose(trace.gradients[at][name], gradient, rtol=0, atol=3e-4 * largest + 1e-9), (at, name)
        kls.append(kl)
    assert trace.metrics[0]["train/kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert float(kls[0].mean()) > 1e-3, "routing alone parts the two before the first update"


@pytest.mark.parametrize("changes", [{}, {MICRO: 1}, {CORRECTION: "gspo"}], ids=["packed", "micro", "gspo"])
def test_the_gradient_is_that_of_objective_and_kl(path, batch, changes):
    trace = learn(settings(path, **KL, **{UPDATES: 2}, **changes), batch, ADVANTAGES)
    require(trace, path, batch, by_sequence=CORRECTION in changes)


@pytest.mark.parametrize("slices", [1, 2])
def test_two_ranks_learn_what_one_learns(path, batch, two, slices):
    config = settings(path, **KL, **{UPDATES: 2, "trainer.policy.sequence_parallel_size": slices})
    for trace in two.all(learn, config, batch, ADVANTAGES):
        require(trace, path, batch)


def test_the_estimator_is_right_where_float32_has_no_digits_left():
    logprobs = torch.tensor([-1.0, -1.0, -1.0, 0.0])
    reference = torch.tensor([-1.0, -1.0001, -3.0, 0.0])
    diff = reference.double() - logprobs.double()
    torch.testing.assert_close(
        kl_to_reference(logprobs, reference).double(), diff.exp() - diff - 1, rtol=1e-3, atol=1e-12
    )
    moved = logprobs.clone().requires_grad_()
    kl_to_reference(moved, reference).sum().backward()
    torch.testing.assert_close(moved.grad.double(), 1 - diff.exp())


def test_the_reference_stays_as_it_was_and_says_that_it_does_not_replay(path, batch, caplog):
    with process_group(), caplog.at_level(logging.WARNING, logger="r3"):
        config = settings(path, **KL)
        policy = Policy(config)
        reference: Any = policy.reference
        assert [record.getMessage().count("not replayed") for record in caplog.records] == [1]
        before = full(reference.named_parameters())
        update(config, policy, StepBatch.of(batch, ADVANTAGES))
        after = full(reference.named_parameters())
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())
        rows: Rows = next(policy.rows(StepBatch.of(batch, ADVANTAGES), 4))
        found = policy.reference_logprobs(rows)
        assert found is not None
        assert not found.requires_grad
        assert not torch.equal(found, policy.logprobs(rows, replayed=True).detach())
        caplog.clear()
        assert Policy(settings(path)).reference is None
        assert caplog.records == []
