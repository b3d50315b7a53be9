"""What the trainer measures of a step: the numbers that a plain model alone gives, packed or padded, on any ranks."""

import dataclasses
import math

import pytest
import torch
from places import DEMO_MODEL
from ranks import Ranks
from step_batches import made_batch

import r3
from r3.capture import Rollout, RolloutBatch, Rollouts
from r3.diagnostics import LogprobSums, compare_routing
from r3.diagnostics.metric import without_layer
from r3.diagnostics.registry import GROUPS, declared, is_declared
from r3.routing import RoutingSpec
from r3.sampling_mask import SamplingMask
from trainer_hooks.batches import StepBatch
from trainer_hooks.grpo import GRPOTrainer
from trainer_hooks.launch import process_group
from trainer_hooks.measurement import StepGap, coverage, measure
from trainer_hooks.policy import Policy

EXACT = ("tokens", "rows", "sequences")


def config(**overrides) -> r3.R3Config:
    pairs = {"trainer.policy.fsdp_config.param_dtype": "float32"} | overrides
    return r3.R3Config.from_overrides(
        [f"{key}={value}" for key, value in pairs.items()], {"trainer.policy.model.path": str(DEMO_MODEL)}
    )


def rollouts_of_a_step() -> RolloutBatch:
    """Four rollouts of three lengths; their routing is live routing in which some choices differ."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(3)
    batch = made_batch(generator).select([0, 1, 2, 0])
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    r3.attach(model)
    with torch.no_grad(), r3.record(model) as recorder:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    ids = recorder.routing.expert_ids.clone()
    ids[:, 2::3, 3] = (ids[:, 2::3, 3].int() + 1).remainder(32).sort(-1).values.to(ids.dtype)
    ids[:, :, 5] = ids[:, :, 5].flip(-1)
    valid = batch.attention_mask.bool()
    valid[:, 8] = False
    found = logits.log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    noise = 0.1 * torch.randn(found.shape, generator=generator)
    logprobs = torch.zeros(batch.logprobs.shape)
    logprobs[:, 1:] = found + noise
    logprobs.masked_fill_(~batch.response_mask, 0)
    by_layer = valid[..., None].repeat(1, 1, 8)
    by_layer[:, 1::4, 6] = False
    routing = r3.RolloutRouting(ids, by_layer, recorder.routing.layer_ids, 32)
    return dataclasses.replace(batch, logprobs=logprobs, routing=routing)


def measured(overrides: dict, batch: RolloutBatch, details: bool = True):
    with process_group():
        policy = Policy(config(**overrides))
        whole = StepBatch.of(batch, torch.zeros(len(batch.input_ids)))
        return measure(policy, whole, size=2, extreme_ratio=1.1, details=details)


def expected(batch: RolloutBatch) -> dict[str, float]:
    """Each rollout alone through a plain model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    r3.attach(model)
    totals: dict[str, list] = {"live": [], "replayed": []}
    live_ids = []
    for b in range(len(batch.input_ids)):
        n = int(batch.attention_mask[b].sum())
        ids, mask = batch.input_ids[b : b + 1, :n], batch.response_mask[b, 1:n]
        routing = batch.routing.select([b])
        taken = routing.expert_ids.long().masked_fill(~routing.validity[..., None], -1)[:, :n]
        for side, keyword in (("live", {}), ("replayed", {"routed_experts": taken})):
            with torch.no_grad(), r3.record(model) as recorder:
                logits = model(input_ids=ids, use_cache=False, **keyword).logits
            if side == "live":
                live_ids.append(torch.nn.functional.pad(recorder.routing.expert_ids[0], (0, 0, 0, 0, 0, 12 - n)))
            found = logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            totals[side].append((found - batch.logprobs[b, 1:n].double())[mask])
    values = {}
    for side, parts in totals.items():
        d = torch.cat(parts)
        zero = torch.zeros_like(d)
        gap = LogprobSums.from_tensors(d, zero, zero == 0, extreme_ratio=1.1).metrics()
        values |= {f"logprob_diff/{side}/{k}": gap[k] for k in ("tokens", "abs_mean", "abs_max", "k1", "k3", "ess")}
        sums = torch.stack([part.sum() for part in parts])
        values[f"logprob_diff/{side}/sequences"] = float(len(parts))
        values[f"logprob_diff/{side}/chi2_seq"] = float((2 * sums).expm1().mean())
        values[f"logprob_diff/{side}/seq_log_ratio_max"] = float(sums.abs().max())
    live = torch.stack(live_ids)
    routing = compare_routing(live, batch.routing.expert_ids, batch.routing.validity)
    return values | {f"routing/{key}": value for key, value in routing.items()}


@pytest.fixture(scope="module")
def batch():
    return rollouts_of_a_step()


@pytest.fixture(scope="module")
def truth(batch):
    found = expected(batch)
    assert found["logprob_diff/live/k3"] > found["logprob_diff/replayed/k3"] / 3 > 0
    assert 0 < found["routing/differing_rows"] < 0.2
    assert found["routing/order_differs"] > 0.1
    return found


def require_equal(metrics: dict[str, float], truth: dict[str, float]) -> None:
    wrong = {
        key: (metrics[key], value)
        for key, value in truth.items()
        if metrics[key] != pytest.approx(value, rel=2e-4, abs=6e-5)
    }
    assert not wrong


@pytest.mark.parametrize("packed", [True, False])
def test_metrics_are_those_of_each_rollout_alone(batch, truth, packed):
    metrics = measured({"trainer.use_sample_packing": packed}, batch).metrics
    require_equal(metrics, truth)
    summed = ("log-probabilities", "sequences", "routing", "load", "margin")
    expected = {key for _, keys in declared([group for group in GROUPS if group.name in summed]) for key in keys}
    assert {without_layer(key) for key in metrics} == expected


@pytest.mark.parametrize("sequence_parallel_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_metrics_and_details_are_the_same_on_two_ranks(batch, truth, sequence_parallel_size):
    alone = measured({}, batch)
    ranks = Ranks(2)
    try:
        found = ranks.all(measured, {"trainer.policy.sequence_parallel_size": sequence_parallel_size}, batch)
    finally:
        ranks.close()
    for one in found:
        require_equal(one.metrics, truth)
        assert one.metrics.keys() == alone.metrics.keys()
        assert one.details["tokens_seen"] == alone.details["tokens_seen"] == int(batch.response_mask.sum())
        assert one.details["load"] == alone.details["load"]
        places = [[(w["sample"], w["position"], w["layers"]) for w in each.details["worst"]] for each in (one, alone)]
        assert places[0] == places[1]


def with_sets(batch: RolloutBatch) -> RolloutBatch:
    """Each token with the 5 ids after it."""
    ids = (batch.input_ids[batch.response_mask][:, None] + torch.arange(6)) % 384
    mask = SamplingMask(batch.response_mask.long() * 6, ids.flatten().int())
    return dataclasses.replace(batch, sampling_mask=mask)


def masses(batch: RolloutBatch) -> torch.Tensor:
    """Of the sets, each rollout alone through a plain model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    r3.attach(model)
    found, sets = [], iter(batch.sampling_mask.token_ids.long().split(6))
    for b in range(len(batch.input_ids)):
        n = int(batch.attention_mask[b].sum())
        routing = batch.routing.select([b])
        taken = routing.expert_ids.long().masked_fill(~routing.validity[..., None], -1)[:, :n]
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[b : b + 1, :n], use_cache=False, routed_experts=taken).logits
        shares = logits[0].double().softmax(-1)
        found += [shares[at - 1, next(sets)].sum() for at in batch.response_mask[b].nonzero()[:, 0].tolist()]
    return torch.stack(found)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_the_sets_hold_of_the_trainers_own_distribution(batch, packed):
    cut = with_sets(batch)
    expected, overrides = masses(cut), {"trainer.use_sample_packing": packed}
    ranks = Ranks(2)
    try:
        both = ranks.all(measured, overrides, cut, False)
    finally:
        ranks.close()
    assert expected.min() < 0.5 * expected.mean() < 0.5, "or the two metrics could not be told apart"
    for found in (measured(overrides, cut, False), *both):
        assert found.metrics["rollout/set_mass_mean"] == pytest.approx(float(expected.mean()), rel=1e-3)
        assert found.metrics["rollout/set_mass_min"] == pytest.approx(float(expected.min()), rel=1e-3)
    assert "rollout/set_mass_mean" not in measured(overrides, batch, False).metrics


def test_training_forwards_give_the_replayed_side_for_nothing(batch, truth):
    for updates, samples in ((1, 4), (2, 2)):
        settings = config(**{"trainer.micro_train_batch_size": 2, "trainer.updates_per_step": updates})
        with process_group():
            policy, untouched = Policy(settings), Policy(settings)
            gap = StepGap(samples=4, extreme_ratio=1.1)
            metrics = GRPOTrainer(settings, None, policy, None).update(StepBatch.of(batch, torch.ones(4)), gap)
            found = gap.reduced().metrics()
            # What comes before the first update alone: after it the weights are not those that sampled.
            before = StepBatch.of(batch.select(slice(samples)), torch.ones(samples))
            expected = measure(untouched, before, size=2, extreme_ratio=1.1, details=False).metrics
        tokens, routing = int(batch.attention_mask.sum()), batch.routing
        assert metrics["routing/rows_replayed"] == routing.rows_valid
        assert metrics["routing/rows_live"] == tokens - routing.rows_valid
        assert metrics["routing/pairs_live"] == 8 * tokens - routing.pairs_valid
        assert found.keys() == {key for key in expected if key.startswith("logprob_diff/replayed")}
        assert found["logprob_diff/replayed/sequences"] == samples
        assert all(map(is_declared, metrics))
        require_equal(found, {key: expected[key] for key in found})


def test_worst_tokens_are_told_by_place_text_and_layers(batch):
    from transformers import AutoTokenizer

    details = measured({}, batch).details
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    worst = details["worst"][0]
    sample, position = worst["sample"], worst["position"]
    assert worst["token"] == tokenizer.decode([int(batch.input_ids[sample, position])])
    assert worst["rollout"] == pytest.approx(float(batch.logprobs[sample, position]))
    assert set(worst["layers"]) <= {3}
    assert any(worst["layers"] for worst in details["worst"])
    assert sum(count for _, _, count in details["histogram"]["live"]) == int(batch.response_mask.sum())


def test_without_routing_there_is_one_side_and_no_routing(batch):
    bare = dataclasses.replace(batch, routing=None)
    overrides = {
        "generator.inference_engine.enable_return_routed_experts": "false",
        "trainer.policy.fsdp_config.moe_enable_routing_replay": "false",
    }
    found = measured(overrides, bare)
    assert {key.split("/")[1] for key in found.metrics} == {"live"}
    assert found.details["tokens"]["replayed"] is None
    assert "load" not in found.details


def rollout(tokens: int, version: int | None, captured: int) -> Rollout:
    ids = torch.arange(4).repeat(1, 3 + tokens, 8, 1)
    valid = torch.arange(3 + tokens)[None] < captured
    return Rollout(
        prompt_ids=[5, 6, 7],
        token_ids=[8] * tokens,
        response_mask=torch.ones(tokens, dtype=torch.bool),
        logprobs=torch.zeros(tokens),
        routing=r3.RolloutRouting(ids, valid, tuple(range(8)), 32),
        finish_reason="stop",
        weight_versions=() if version is None else (version,),
        row_versions=None if version is None else torch.full((3 + tokens,), version, dtype=torch.int32),
    )


def test_coverage_and_version_lag_of_a_step():
    items = [rollout(5, 4, captured=7), rollout(2, 2, captured=3)]
    rollouts = Rollouts(items, RoutingSpec(layer_ids=tuple(range(8)), num_layers=8, num_experts=32, top_k=4))
    found = coverage(rollouts, rollouts.batch(0), trainer_version=5)
    # Of 8 and 5 tokens, the last of each has no row.
    assert found["routing/coverage"] == 10 / 11
    assert found["routing/rows_invalid"] == 1
    assert found["routing/version_lag_max"] == 3
    assert found["routing/version_lag_mean"] == pytest.approx((7 * 1 + 4 * 3) / 11)
    untold = Rollouts([*items, rollout(2, None, captured=4)], rollouts.spec)
    found = coverage(untold, untold.batch(0), trainer_version=5)
    assert math.isnan(found["routing/version_lag_max"])
    assert found["routing/version_unknown"] == 15
