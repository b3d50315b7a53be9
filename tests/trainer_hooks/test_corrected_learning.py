"""What the policy learns under a correction of the gap: loss, gradients and metrics against each method's own formula,
in float64, one rollout at a time."""

from dataclasses import replace

import pytest
import torch
from learning_steps import (
    ADVANTAGES,
    HIGH,
    LOW,
    Trace,
    learn,
    plain_model,
    sampled_logprobs,
    settings,
)

import r3
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy
from trainer_hooks.policy_loss import PolicyLoss
from trainer_hooks.update import update

MICRO = "trainer.micro_train_batch_size"
PACKED = "trainer.use_sample_packing"
UPDATES = "trainer.updates_per_step"
SLICES = "trainer.policy.sequence_parallel_size"
ALGORITHM = "trainer.algorithm"

METHODS = {
    "tis": {f"{ALGORITHM}.correction": "tis", f"{ALGORITHM}.correction_high": 1.2},
    "tis sequences": {
        f"{ALGORITHM}.correction": "tis",
        f"{ALGORITHM}.correction_level": "sequence",
        f"{ALGORITHM}.correction_high": 1.1,
    },
    "mis": {f"{ALGORITHM}.correction": "mis", f"{ALGORITHM}.correction_high": 1.2},
    "mis sequences": {
        f"{ALGORITHM}.correction": "mis",
        f"{ALGORITHM}.correction_level": "sequence",
        f"{ALGORITHM}.correction_high": 1.1,
    },
    "icepop": {
        f"{ALGORITHM}.correction": "icepop",
        f"{ALGORITHM}.correction_low": 0.7,
        f"{ALGORITHM}.correction_high": 1.5,
    },
    "gspo": {
        f"{ALGORITHM}.correction": "gspo",
        f"{ALGORITHM}.eps_clip_low": 0.05,
        f"{ALGORITHM}.eps_clip_high": 0.06,
    },
}


def surrogate(ratio, advantage, low, high):
    """PPO's by cases."""
    return advantage * (ratio.clamp(max=1 + high) if advantage > 0 else ratio.clamp(min=1 - low))


def weights_of(method, ratio):
    """Of tokens with these ratios of trainer to rollout; and which of them are outside the bounds."""
    if method.endswith("sequences"):
        ratio = ratio.prod().expand(ratio.shape)
    high = {"tis": 1.2, "mis": 1.2, "icepop": 1.5}.get(method, 1.1)
    outside = (ratio > high) | (ratio < 0.7 if method == "icepop" else ratio < 0)
    return (ratio.clamp(max=high) if "tis" in method else ratio.masked_fill(outside, 0)), outside


def truth(path, state, first_state, batch, rollouts, method):
    """Loss, gradients, tokens beyond the clip bounds, weights and which are outside, of one update."""
    model, before = plain_model(path, state), plain_model(path, first_state)
    terms, clipped, weights, outsides = [], 0, [], []
    for b in rollouts:
        sampled = batch.logprobs[b][batch.response_mask[b]].double()
        new = sampled_logprobs(model, batch, b)
        if method == "gspo":
            s = (new - sampled).mean().exp()
            terms.append(surrogate(s, float(ADVANTAGES[b]), 0.05, 0.06).expand(1))
            clipped += len(new) * int(not 0.95 <= s <= 1.06)
            weights.append(s.detach().expand(len(new)))
            outsides.append(torch.zeros(len(new), dtype=torch.bool))
            continue
        with torch.no_grad():
            old = sampled_logprobs(before, batch, b)
        ratio = (new - old).exp()
        weight, outside = weights_of(method, (old - sampled).exp())
        terms.append(weight * surrogate(ratio, float(ADVANTAGES[b]), LOW, HIGH))
        clipped += int(((ratio < 1 - LOW) | (ratio > 1 + HIGH)).sum())
        weights.append(weight)
        outsides.append(outside)
    loss = -torch.cat(terms).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return float(loss.detach()), gradients, clipped, torch.cat(weights), torch.cat(outsides)


def require(trace: Trace, path, batch, method, minis):
    found, tokens = trace.metrics[0], int(batch.response_mask.sum())
    loss, clipped, weights, outsides = 0.0, 0, [], []
    for at, rollouts in enumerate(minis):
        value, gradients, beyond, weight, outside = truth(
            path, trace.weights[at], trace.weights[0], batch, rollouts, method
        )
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())
            assert torch.allclose(trace.gradients[at][name], gradient, rtol=0, atol=3e-4 * largest + 1e-9), (at, name)
        loss, clipped = loss + value * len(weight) / tokens, clipped + beyond
        weights.append(weight)
        outsides.append(outside)
    weight, outside = torch.cat(weights), torch.cat(outsides)
    kind = "clipped" if "tis" in method or method == "gspo" else "masked"
    assert found["train/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert found["train/clipped_frac"] == pytest.approx(clipped / tokens)
    assert found["correction/tokens"] == tokens
    assert found[f"correction/{kind}_frac"] == pytest.approx(float(outside.double().mean()))
    assert found["correction/weight_mean"] == pytest.approx(float(weight.mean()), rel=1e-4)
    ess = float(weight.sum() ** 2 / (len(weight) * weight.square().sum()))
    assert found["correction/ess"] == pytest.approx(ess, rel=1e-4)
    assert found.get("correction/sequences", 4) == 4
    # The rollouts are such that each method has something to do, and not everything.
    assert 0 < float(outside.double().mean() if method != "gspo" else clipped / tokens) < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "minis"),
    [
        ({}, [[0, 1, 2, 3]]),
        ({UPDATES: 2, MICRO: 1}, [[0, 1], [2, 3]]),
        ({UPDATES: 2, PACKED: False}, [[0, 1], [2, 3]]),
    ],
    ids=["packed", "twice in micro-batches", "padded twice"],
)
def test_gradients_are_those_of_the_method(path, batch, method, changes, minis):
    trace = learn(settings(path, **METHODS[method], **changes), batch, ADVANTAGES)
    require(trace, path, batch, method, minis)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{UPDATES: 2, MICRO: 1}, {UPDATES: 2, SLICES: 2}], ids=["data", "sequence"])
def test_two_ranks_learn_what_one_learns(path, batch, two, method, changes):
    traces = two.all(learn, settings(path, **METHODS[method], **changes), batch, ADVANTAGES)
    for trace in traces:
        require(trace, path, batch, method, [[0, 1], [2, 3]])


def counted(config, batch):
    """How many forwards an update of two mini-batches makes."""
    calls = []
    with process_group():
        policy = Policy(config)
        policy.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        update(config, policy, StepBatch.of(batch, ADVANTAGES))
    return calls


def test_old_log_probabilities_are_computed_only_where_they_are_not_at_hand(path, batch):
    tis = METHODS["tis"]
    assert counted(settings(path, **tis), batch) == [True]
    assert counted(settings(path, **tis, **{UPDATES: 2}), batch) == [False, True, True]
    for method in ("none", "gspo"):
        config = settings(path, **{f"{ALGORITHM}.correction": method, UPDATES: 2})
        assert counted(config, batch) == [True, True]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["correction_high=3"], "correction_high=3.0: trainer.algorithm.correction=none does not use it"),
        (["correction=gspo", "correction_high=3"], "correction=gspo does not use it"),
        (["correction=tis", "correction_low=0.5"], "correction=tis does not use it"),
        (["correction=icepop", "correction_level=sequence"], "correction=icepop does not use it"),
        (["correction=icepop", "correction_low=1", "correction_high=1"], "expected below correction_high"),
    ],
)
def test_bounds_that_nothing_uses_are_refused(pairs, message):
    with pytest.raises(r3.ConfigError, match=message):
        r3.R3Config.from_overrides([f"{ALGORITHM}.{pair}" for pair in pairs])


def deal(batch, rollouts):
    with process_group():
        mesh = r3.parallel.make_mesh("cpu")
        whole = StepBatch.of(batch, ADVANTAGES).select(slice(0, rollouts))
        return len(list(whole.rows(mesh, size=1, packed=True)))


def test_rollouts_that_would_leave_a_rank_waiting_are_refused_on_all(batch, two):
    assert two.run(deal, batch, 4) == [2, 2]
    for rollouts in (3, 0):
        for error in two.run(deal, batch, rollouts):
            assert isinstance(error, r3.CaptureError)
            assert f"expected a multiple of 2, the ranks with rows of their own, got {rollouts}" in str(error)


@pytest.mark.parametrize("method", ["none", "tis", "gspo"])
def test_a_rank_without_a_sampled_token_goes_along(path, batch, two, method):
    """With two ranks, rollouts 1 and 3 are those of the second."""
    without = replace(batch, response_mask=batch.response_mask.clone())
    without.response_mask[1::2] = False
    config = settings(path, **METHODS.get(method, {}), **{MICRO: 1})
    alone = learn(config, without, ADVANTAGES)
    for trace in two.all(learn, config, without, ADVANTAGES):
        assert trace.metrics[0]["train/loss"] == pytest.approx(alone.metrics[0]["train/loss"], rel=1e-5)
        for name, gradient in alone.gradients[0].items():
            torch.testing.assert_close(trace.gradients[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_an_update_without_a_sampled_token_is_refused(path, batch):
    without = replace(batch, response_mask=batch.response_mask.clone())
    without.response_mask[2:] = False
    with pytest.raises(r3.CaptureError, match="got none in 1 of 2 updates"):
        learn(settings(path, **{UPDATES: 2}), without, ADVANTAGES)


@pytest.mark.parametrize("method", ["tis", "mis", "icepop"])
def test_a_correction_without_bounds_has_those_of_its_function(path, batch, method):
    found = r3.R3Config.from_overrides([f"{ALGORITHM}.correction={method}"])
    whole = StepBatch.of(batch, ADVANTAGES)
    rows = Rows.of(whole, packed=True)
    sums = PolicyLoss(found.trainer.algorithm, whole, samples=4)(rows, rows.logprobs, rows.logprobs).correction
    assert (sums.low, sums.high) == ((0.5, 5.0) if method == "icepop" else (0.0, 2.0))
    assert sums.weight_sum == int(batch.response_mask.sum())
