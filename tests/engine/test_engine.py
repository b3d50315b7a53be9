"""The main path with a real vLLM engine: replay closes the gap, gates train, the engine follows."""

import dataclasses

import pytest
import torch
from sync_helpers import following, prompts

import r3
from r3.capture import collect, sampling_kwargs
from r3.diagnostics import compare_logprobs, compare_routing
from trainer_hooks.rollouts_ahead import RolloutsAhead

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def trainer(engine, demo_config, weights):
    """The demo's trainer around the shared engine; gives the engine its weights back at the end."""
    from grpo_demo import CHAIN_SUM, ReasoningGymTask

    from trainer_hooks.grpo import GRPOTrainer
    from trainer_hooks.launch import process_group
    from trainer_hooks.policy import Policy

    with process_group():
        made = GRPOTrainer(demo_config, ReasoningGymTask("chain_sum", 0, CHAIN_SUM), Policy(demo_config), engine)
        made.sync.push(weights.items(), version=following(made.sync))
        yield made
        made.sync.push(weights.items(), version=following(made.sync))
        made.sync.close()


def test_replay_lowers_k3_to_a_third_of_live_or_less(trainer):
    from trainer_hooks.batches import StepBatch

    # A few tokens make up most of the live gap: fewer rollouts than these would measure chance.
    rollouts = trainer.rollout(trainer.task.problems(0, 64), 0)
    batch = rollouts.batch(trainer.policy.tokenizer.pad_token_id)
    metrics = trainer.measure(StepBatch.of(batch, torch.zeros(len(rollouts)))).metrics
    assert metrics["logprob_diff/replayed/tokens"] > 20_000
    assert 0 < metrics["logprob_diff/replayed/k3"] <= metrics["logprob_diff/live/k3"] / 3
    assert 0 < metrics["routing/differing_rows"] < 0.3


def replayed_k3(policy, batch):
    """k3 of `batch` with its routing replayed."""
    from trainer_hooks.batches import StepBatch

    with torch.no_grad():
        policy.model.eval()
        (rows,) = policy.rows(StepBatch.of(batch, torch.zeros(len(batch.input_ids))), len(batch.input_ids))
        return compare_logprobs(policy.logprobs(rows, replayed=True), rows.logprobs, rows.mask)["k3"]


def test_rows_shifted_by_one_make_the_gap_jump(trainer):
    batch = trainer.rollout(trainer.task.problems(1, 4), 1).batch(trainer.policy.tokenizer.pad_token_id)
    ids = batch.routing.expert_ids.roll(1, dims=1)
    shifted = r3.RolloutRouting(ids, batch.routing.valid & (ids.sum((2, 3)) > 0), batch.routing.layer_ids, 32)
    right = replayed_k3(trainer.policy, batch)
    assert replayed_k3(trainer.policy, dataclasses.replace(batch, routing=shifted)) > 100 * right


def truncated(trainer, monkeypatch, problems, **sampling):
    """A batch that is sampled with these settings."""
    config = r3.R3Config.from_overrides(
        [f"generator.sampling_params.{name}={value}" for name, value in sampling.items()],
        {key: value for key, value in trainer.config.to_flat().items() if "sampling_params" not in key},
    )
    monkeypatch.setattr(trainer.policy, "temperature", config.generator.sampling_params.temperature)
    monkeypatch.setattr(trainer, "config", config)
    return trainer.rollout(trainer.task.problems(7, problems), 7).batch(trainer.policy.tokenizer.pad_token_id)


def test_what_top_p_left_out_is_left_out_in_the_trainer(trainer, monkeypatch):
    batch = truncated(trainer, monkeypatch, 4, top_k=50, top_p=0.5, max_generate_length=48)
    sizes = batch.sampling_mask.sizes[batch.response_mask]
    assert 1 == int(sizes.min()) < int(sizes.max()) <= 50
    assert not batch.logprobs[batch.response_mask][sizes == 1].any()
    over_vocabulary = replayed_k3(trainer.policy, dataclasses.replace(batch, sampling_mask=None))
    assert 0 < replayed_k3(trainer.policy, batch) < over_vocabulary / 5
    metrics, _ = trainer.step(trainer.sync.version + 1)
    assert metrics["rollout/set_size_mean"] > 1 > metrics["rollout/set_single_frac"] > 0
    assert 0.4 < metrics["rollout/set_mass_min"] < metrics["rollout/set_mass_mean"] < 1, "top_p is 0.5"
    assert metrics["logprob_diff/replayed/k3"] < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_over_the_replayed_sets_the_gap_is_as_small_as_over_the_whole_vocabulary(trainer, temperature, monkeypatch):
    whole = replayed_k3(trainer.policy, truncated(trainer, monkeypatch, 24, temperature=temperature))
    cuts = [(1, 1.0, 0.0), (8, 1.0, 0.0), (50, 0.5, 0.0), (50, 0.9, 0.0), (50, 1.0, 0.1)]
    for top_k, top_p, min_p in cuts:
        cut = dict(top_k=top_k, top_p=top_p, min_p=min_p)
        batch = truncated(trainer, monkeypatch, 24, temperature=temperature, **cut)
        assert int(batch.sampling_mask.sizes[batch.response_mask].max()) <= top_k
        over_sets = replayed_k3(trainer.policy, batch)
        over_vocabulary = replayed_k3(trainer.policy, dataclasses.replace(batch, sampling_mask=None))
        print(f"temperature {temperature}, {cut}: {whole:.2e}, {over_sets:.2e}, {over_vocabulary:.2e}")
        assert over_sets <= 1.5 * whole
        assert over_vocabulary > over_sets


def zeroed(array):
    return array * 0


def repeated(array):
    array = array.copy()
    array[2, 5] = array[2, 5, 0]
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zeroed, "were never captured"),
        (repeated, "position 2, decoder layer 5"),
        (lambda array: array[:-1], r"expected integer routing \[prompt \+ generated - 1"),
        (lambda array: None, "does not return it"),
    ],
)
def test_degenerate_capture_stops_the_step_before_training(trainer, monkeypatch, change, message):
    generate = trainer.engine.generate

    def tampered(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        outputs[3].outputs[1].routed_experts = change(outputs[3].outputs[1].routed_experts)
        return outputs

    monkeypatch.setattr(trainer.engine, "generate", tampered)
    version = trainer.sync.version
    with pytest.raises(r3.CaptureError, match=rf"(?s)1 of 64 samples.*prompt 3, completion 1.*{message}"):
        trainer.step(50)
    assert trainer.sync.version == version


def test_gates_move_and_the_engine_follows_the_trainer(trainer, engine):
    from vllm import SamplingParams

    policy = trainer.policy
    input_ids = torch.tensor([p["prompt_token_ids"] for p in prompts(16)])
    batch = {"input_ids": input_ids, "position_ids": torch.arange(input_ids.shape[1])[None]}

    def engine_routing():
        assert engine.reset_prefix_cache()
        outputs = engine.generate(prompts(16), SamplingParams(max_tokens=1, logprobs=0), use_tqdm=False)
        return collect(outputs, policy.replay.spec).batch(0).routing.expert_ids[:, :-1]

    def gates():
        return {n: p.full_tensor().clone() for n, p in policy.model.named_parameters() if n.endswith("gate.weight")}

    old, before = engine_routing(), gates()
    for step in range(1, 4):
        metrics, _ = trainer.step(trainer.sync.version + 1)
        assert metrics["sync/version"] == trainer.sync.version, step
        assert metrics["routing/rows_replayed"] > 10 * metrics["routing/rows_live"] > 0
    new, after = engine_routing(), gates()

    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(old, new)
    with torch.no_grad(), r3.record(policy.model) as recorder:
        policy.model.eval()
        policy.model(**batch, use_cache=False)
    live, everywhere = recorder.routing.expert_ids, recorder.routing.valid
    to_old, to_new = (compare_routing(live, ids, everywhere)["differing_rows"] for ids in (old, new))
    assert to_new < 0.5 * to_old


@pytest.mark.long
def test_rollouts_of_the_next_step_are_sampled_while_one_trains_and_replay_closes_their_gap_too(trainer, monkeypatch):
    few = ["trainer.train_batch_size=4", "generator.sampling_params.max_generate_length=24"]
    path = trainer.config.trainer.policy.model.path
    monkeypatch.setattr(trainer, "config", r3.R3Config.from_overrides(few, {"trainer.policy.model.path": path}))
    first = trainer.sync.version + 1
    steps = range(first, first + 3)
    lags = []
    with RolloutsAhead(trainer.experience, steps, version=first - 1, max_staleness=1) as ahead:
        for step in steps:
            metrics, _ = trainer.step(step, ahead)
            assert metrics["sync/version"] == step
            lags.append((metrics["routing/version_lag_mean"], metrics["routing/version_lag_max"]))
            assert metrics["logprob_diff/replayed/abs_mean"] < metrics["logprob_diff/live/abs_mean"]
    # The first two are sampled by the weights that the engine had before the loop.
    assert lags == [(0, 0), (1, 1), (1, 1)]


def test_sampling_and_engine_agree_on_what_a_logprob_is(engine, demo_config, trainer):
    from vllm import SamplingParams

    warm = r3.R3Config.from_overrides(
        ["generator.sampling_params.temperature=0.4"], {"trainer.policy.model.path": "unused"}
    )
    problems = trainer.task.problems(9, 4)
    asked = [{"prompt_token_ids": trainer.policy.tokenizer(trainer.task.prompt(p)).input_ids} for p in problems]
    outputs = engine.generate(asked, SamplingParams(**sampling_kwargs(warm)), use_tqdm=False)
    batch = collect(outputs, trainer.policy.replay.spec).batch(trainer.policy.tokenizer.pad_token_id)
    gaps = {}
    for temperature in (0.4, 1.0):
        trainer.policy.temperature = temperature
        gaps[temperature] = replayed_k3(trainer.policy, batch)
    trainer.policy.temperature = demo_config.generator.sampling_params.temperature
    assert gaps[0.4] < 1e-2 * gaps[1.0]


def test_an_engine_is_compared_with_the_policy_before_the_first_step(trainer, engine, demo_config):
    """Healthy, and with one tensor of the policy that is not the engine's: which is named, and can be accepted."""
    from trainer_hooks.engine_check import check_engine

    found = check_engine(demo_config, trainer.policy, engine)
    assert found.keys() == {"engine/k3_live", "engine/k3_replayed", "engine/differing_rows", "engine/repeat_nats"}
    assert 0 < found["engine/k3_replayed"] < 5e-3
    assert found["engine/differing_rows"] < 0.15
    norm = trainer.policy.model.get_parameter("model.norm.weight")
    before = norm.detach().clone()
    try:
        with torch.no_grad():
            norm.mul_(0.3)
        with pytest.raises(r3.errors.AlarmError, match=r"on qwen3_moe, of the same weights[\s\S]*\n  logprobs: k3 is "):
            check_engine(demo_config, trainer.policy, engine)
        diagnostics = dataclasses.replace(demo_config.trainer.diagnostics, accepted_engine_faults=["logprobs"])
        accepting = dataclasses.replace(
            demo_config, trainer=dataclasses.replace(demo_config.trainer, diagnostics=diagnostics)
        )
        assert check_engine(accepting, trainer.policy, engine)["engine/k3_replayed"] > 2e-2
    finally:
        with torch.no_grad():
            norm.copy_(before)


def test_rollouts_that_come_in_few_messages_are_those_that_come_token_by_token(engine, trainer):
    """Answers that are read when complete come so; a stop string has each step sent. One at a time, for equal sums."""
    from vllm import SamplingParams

    def sampled(seed, **how):
        assert engine.reset_prefix_cache()
        params = SamplingParams(seed=seed, logprobs=0, temperature=1.0, max_tokens=90, ignore_eos=True, **how)
        (output,) = engine.generate([{"prompt_token_ids": list(range(3, 9 + seed))}], params, use_tqdm=False)
        return output, collect([output], trainer.policy.replay.spec).items[0]

    for seed in range(3):
        quick, one = sampled(seed, flat_logprobs=True, detokenize=False)
        slow, other = sampled(seed, stop=["never sampled"])
        assert slow.outputs[0].text
        assert not quick.outputs[0].text
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.routing.expert_ids, other.routing.expert_ids)
        assert torch.equal(one.routing.valid, other.routing.valid)
        assert one.routing.rows_valid == len(one) - 1


def test_a_request_for_more_logprobs_beside_others_leaves_theirs_their_own(engine, trainer):
    """The engine's rows of a step are as wide as the widest request of that step, which ends before the others."""
    from vllm import SamplingParams

    wanted = [0, 3, 0, 5]
    params = [
        SamplingParams(seed=i, logprobs=k, max_tokens=40 if k else 90, ignore_eos=True) for i, k in enumerate(wanted)
    ]
    asked = [{"prompt_token_ids": list(range(3, 9 + i))} for i in range(len(params))]
    outputs = engine.generate(asked, params, use_tqdm=False)
    for k, output, rollout in zip(wanted, outputs, collect(outputs, trainer.policy.replay.spec), strict=True):
        entries = output.outputs[0].logprobs
        assert len(entries) == len(rollout.token_ids) == (40 if k else 90)
        assert {len(entry) for entry in entries} <= {max(k, 1), k + 1}
        for entry, token, logprob in zip(entries, rollout.token_ids, rollout.logprobs.tolist(), strict=True):
            assert (
                entry[token].logprob == logprob == max(e.logprob for e in entry.values() if e.rank == entry[token].rank)
            )
