"""What the policy learns: the objective's gradient, AdamW's step, and log-probabilities that move the right way."""

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from learning_steps import (
    ADVANTAGES,
    CASE,
    LENGTHS,
    PROMPT,
    Trace,
    adamw,
    formula,
    full,
    learn,
    plain_model,
    sampled_logprobs,
    settings,
)
from places import DEMO_MODEL

import r3
from r3.capture import Rollout, Rollouts, engine_kwargs
from trainer_hooks.batches import StepBatch
from trainer_hooks.grpo import GRPOTrainer
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy

CLIP = "trainer.policy.optimizer_config.max_grad_norm"
MICRO = "trainer.micro_train_batch_size"
TOKENS = "trainer.micro_train_batch_tokens"
PACKED = "trainer.use_sample_packing"
UPDATES = "trainer.updates_per_step"
SLICES = "trainer.policy.sequence_parallel_size"
REPLAY = "trainer.policy.fsdp_config.moe_enable_routing_replay"


def require_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float) -> None:
    """Each tensor to `relative` of its own largest value."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        largest = float(tensor.abs().max())
        close = torch.allclose(found[name], tensor, rtol=0, atol=relative * largest + 1e-9)
        assert close, f"{name}: off by {float((found[name] - tensor).abs().max())}, of at most {largest}"


def require_learned(trace: Trace, path: Any, batch: Any, *, minis: list[list[int]], clip: float = 1e6) -> None:
    """Each step took the formula's gradient under the weights of that step, clipped, and moved them as AdamW does."""
    assert len(trace.gradients) == len(minis) * len(trace.metrics)
    updates = len(minis)
    for call, metrics in enumerate(trace.metrics):
        truths = []
        for at, rollouts in enumerate(minis, call * updates):
            truth = formula(path, trace.weights[at], batch, ADVANTAGES, rollouts)
            scale = min(1.0, clip / truth.norm)
            require_close(trace.gradients[at], {n: scale * g for n, g in truth.gradients.items()}, relative=2e-4)
            truths.append(truth)
        tokens = [int(batch.response_mask[rollouts].sum()) for rollouts in minis]
        for key, values in (("loss", [t.loss for t in truths]), ("clipped_frac", [t.clipped for t in truths])):
            mean = sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)
            assert metrics[f"train/{key}"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
        # Of all its gradients, before they are clipped.
        assert metrics["train/grad_norm"] == pytest.approx(sum(t.norm for t in truths) / updates, rel=1e-4)
        assert metrics["train/updates"] == updates
    # A step is of 1e-3; what float32 leaves of a weight of 1 is 1e-7.
    for name, weight in adamw(trace.weights[0], trace.gradients).items():
        torch.testing.assert_close(trace.weights[-1][name], weight, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_gradients_and_step_are_those_of_the_formula_however_rollouts_are_batched(path, batch, micro, packed):
    trace = learn(settings(path, **{MICRO: micro, PACKED: packed}), batch, ADVANTAGES)
    require_learned(trace, path, batch, minis=[[0, 1, 2, 3]])


@pytest.mark.parametrize("tokens", [max(LENGTHS) + 1, sum(LENGTHS)])
def test_gradients_and_step_are_those_of_the_formula_however_tokens_are_batched(path, batch, tokens):
    trace = learn(settings(path, **{TOKENS: tokens}), batch, ADVANTAGES)
    require_learned(trace, path, batch, minis=[[0, 1, 2, 3]])


def test_gradients_are_clipped_to_the_norm_over_all_parameters(path, batch):
    trace = learn(settings(path, **{CLIP: 0.01}), batch, ADVANTAGES)
    assert trace.metrics[0]["train/grad_norm"] > 0.1
    require_learned(trace, path, batch, minis=[[0, 1, 2, 3]], clip=0.01)


def test_each_of_several_updates_is_of_its_own_rollouts_alone(path, batch):
    trace = learn(settings(path, **{MICRO: 1, UPDATES: 2, CLIP: 0.5}), batch, ADVANTAGES, calls=2)
    require_learned(trace, path, batch, minis=[[0, 1], [2, 3]], clip=0.5)


@pytest.mark.parametrize(
    ("changes", "minis"),
    [
        ({MICRO: 1}, [[0, 1, 2, 3]]),
        ({PACKED: False, UPDATES: 2, CLIP: 0.5}, [[0, 1], [2, 3]]),
        ({TOKENS: max(LENGTHS)}, [[0, 1, 2, 3]]),
        ({SLICES: 2, MICRO: 3}, [[0, 1, 2, 3]]),
        ({SLICES: 2, MICRO: 1, UPDATES: 2, CLIP: 0.5}, [[0, 1], [2, 3]]),
    ],
    ids=["data", "data padded twice", "data by tokens", "sequence", "sequence twice"],
)
def test_two_ranks_learn_what_one_learns(path, batch, two, changes, minis):
    traces = two.all(learn, settings(path, **changes), batch, ADVANTAGES)
    for trace in traces:
        require_learned(trace, path, batch, minis=minis, clip=changes.get(CLIP, 1e6))
    for name, weight in traces[0].weights[-1].items():
        assert torch.equal(traces[1].weights[-1][name], weight), name


def test_without_replay_the_gradient_is_that_of_live_routing(path, batch):
    trace = learn(settings(path, **{REPLAY: False}), batch, ADVANTAGES)
    live, replayed = (formula(path, trace.weights[0], batch, ADVANTAGES, range(4), replayed=r) for r in (False, True))
    require_close(trace.gradients[0], live.gradients, relative=2e-4)
    assert abs(replayed.loss - live.loss) > 1e-3
    assert trace.metrics[0]["routing/rows_replayed"] == 0
    assert trace.metrics[0]["routing/rows_live"] == sum(LENGTHS)


def test_replay_is_required_where_it_is_asked_for(path, batch):
    for asked in (True, False):
        with process_group():
            policy = Policy(settings(path, **{REPLAY: asked}))
            (rows,) = policy.rows(StepBatch.of(batch, ADVANTAGES), 4)
            policy.model.train()
            if not asked:
                policy.logprobs(rows, replayed=False)
                continue
            with pytest.raises(r3.ReplayError, match="routed_experts"):
                policy.logprobs(rows, replayed=False)
            policy.model.eval()
            policy.logprobs(rows, replayed=False)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_counted_as_replayed_or_live_and_padding_as_neither(path, batch, packed):
    trace = learn(settings(path, **{MICRO: 3, PACKED: packed, UPDATES: 2}), batch, ADVANTAGES)
    valid, real = batch.routing.validity, batch.attention_mask.bool()
    assert trace.metrics[0]["routing/rows_replayed"] == int(valid.all(-1).sum())
    assert trace.metrics[0]["routing/rows_live"] == int((real & ~valid.all(-1)).sum())
    assert trace.metrics[0]["routing/pairs_live"] == int((real[..., None] & ~valid).sum())
    assert 0 < trace.metrics[0]["routing/rows_live"] < sum(LENGTHS) - trace.metrics[0]["routing/rows_live"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_of_the_better_rollout_become_likelier_and_of_the_worse_unlikelier(path, batch, two, ranks):
    pair = batch.select(slice(0, 2))
    model = plain_model(path)
    with torch.no_grad():
        before = [sampled_logprobs(model, pair, b) for b in range(2)]
    # As sampled: every ratio is 1, and the gradient is that of the mean of A log p.
    logprobs = torch.zeros(pair.logprobs.shape).masked_scatter(pair.response_mask, torch.cat(before).float())
    pair = replace(pair, logprobs=logprobs)
    advantages = torch.tensor([1.0, -1.0])
    config = settings(path, **{"trainer.policy.optimizer_config.lr": 1e-4})
    trace = learn(config, pair, advantages) if ranks == 1 else two.all(learn, config, pair, advantages)[0]
    model.load_state_dict(trace.weights[-1])
    with torch.no_grad():
        better, worse = (float((sampled_logprobs(model, pair, b) - before[b]).mean()) for b in range(2))
    assert better > 0.01
    assert worse < -0.01
    # The advantages times the tokens add up to the loss: ratios were 1.
    tokens = pair.response_mask.sum(1)
    assert trace.metrics[0]["train/loss"] == pytest.approx(
        -float(tokens[0] - tokens[1]) / float(tokens.sum()), abs=1e-5
    )


class Scored:
    """Two problems, and a reward for each completion of each."""

    def __init__(self, rewards: dict[tuple[int, str], float]) -> None:
        self.rewards = rewards

    def problems(self, step: int, count: int) -> list[int]:
        return list(range(count))

    def reward(self, problem: int, completion: str) -> float:
        return self.rewards[problem, completion]


class Given(GRPOTrainer):
    """Its rollouts are given; it has no engine, and its loop asks for rollouts as if it had one."""

    def __init__(self, config: Any, rollouts: Rollouts, rewards: list[list[float]], policy: Policy) -> None:
        texts = policy.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        flat = [score for group in rewards for score in group]
        places = [(rollout.prompt_index, text) for rollout, text in zip(rollouts, texts, strict=True)]
        assert len(set(texts)) == len(flat)
        super().__init__(config, Scored(dict(zip(places, flat, strict=True))), policy, None)
        self.engine, self.given, self.recorded = "in name", rollouts, []
        self.log = self

    def rollout(self, problems: Any, step: int) -> Rollouts:
        assert list(problems) == [0, 1]
        return self.given

    def add(self, step: int, metrics: dict[str, float], details: Any) -> None:
        self.recorded.append(metrics)


def rollouts_of(path: Any, batch: Any, *, first_token: int) -> Rollouts:
    """The batch's four rollouts as two completions of two problems, as the model samples them."""
    model, items = plain_model(path), []
    for b, length in enumerate(LENGTHS):
        ids = batch.input_ids[b].tolist()
        experts, valid = (part[b : b + 1, :length] for part in (batch.routing.expert_ids, batch.routing.validity))
        with torch.no_grad():
            logprobs = sampled_logprobs(model, batch, b).float()
        items.append(
            Rollout(
                prompt_ids=ids[:first_token],
                token_ids=ids[first_token:length],
                response_mask=torch.ones(length - first_token, dtype=torch.bool),
                logprobs=logprobs,
                routing=r3.RolloutRouting(experts, valid, CASE.router_layers, CASE.num_experts),
                finish_reason="stop",
                weight_versions=(0,),
                prompt_index=b // 2,
            )
        )
    spec = r3.routing.RoutingSpec(
        layer_ids=CASE.router_layers, num_layers=CASE.num_layers, num_experts=CASE.num_experts, top_k=CASE.top_k
    )
    return Rollouts(items, spec)


REWARDS = [[1.0, 0.0], [-3.0, 2.0]]


def test_each_rollout_gets_the_advantage_of_its_own_reward_in_its_own_group(path, batch):
    rollouts = rollouts_of(path, batch, first_token=PROMPT)
    with process_group():
        config = settings(path, **{"trainer.train_batch_size": 2, "generator.n_samples_per_prompt": 2})
        trainer = Given(config, rollouts, REWARDS, Policy(config))
        made = trainer.experience(1)
    whole, metrics = made.batch, made.metrics
    for b, rollout in enumerate(rollouts):
        assert whole.batch.input_ids[b, : LENGTHS[b]].tolist() == rollout.prompt_ids + rollout.token_ids
        group = REWARDS[b // 2]
        wanted = (group[b % 2] - sum(group) / 2) / statistics.stdev(group)
        assert float(whole.advantages[b]) == pytest.approx(wanted, rel=1e-3)
    assert metrics["reward/mean"] == 0.0
    assert metrics["reward/std_in_group"] == pytest.approx(
        (statistics.stdev(REWARDS[0]) + statistics.stdev(REWARDS[1])) / 2
    )
    assert metrics["rollout/tokens_mean"] == sum(LENGTHS) / 4 - PROMPT


def test_the_loop_makes_rewarded_completions_likelier(path, batch):
    rollouts = rollouts_of(path, batch, first_token=PROMPT)
    with process_group():
        changes = {"trainer.train_batch_size": 2, "generator.n_samples_per_prompt": 2, "trainer.max_steps": 3}
        config = settings(path, **changes, **{"trainer.policy.optimizer_config.lr": 3e-4})
        trainer = Given(config, rollouts, REWARDS, Policy(config))
        trainer.train({"engine/checked": 1.0})
        state = full(trainer.policy.model.named_parameters())
    model = plain_model(path, state)
    for b, rollout in enumerate(rollouts):
        with torch.no_grad():
            change = float((sampled_logprobs(model, batch, b) - rollout.logprobs).mean())
        assert change * (1 if b in (0, 3) else -1) > 0.01
    assert [("engine/checked" in metrics) for metrics in trainer.recorded] == [True, False, False]
    gaps = [metrics["logprob_diff/replayed/abs_max"] for metrics in trainer.recorded]
    assert gaps[0] < 1e-4  # the weights that sampled
    assert gaps[1] > 1e-2


def test_the_engine_computes_its_logits_in_float32():
    """As the trainer does: rounded to bfloat16, they alone would be most of the gap between the two."""
    EngineArgs = pytest.importorskip("vllm.engine.arg_utils").EngineArgs

    kwargs = engine_kwargs(settings(DEMO_MODEL, **{"generator.inference_engine.dtype": "bfloat16"}))
    model_config = EngineArgs(**kwargs).create_engine_config().model_config
    assert (model_config.dtype, model_config.head_dtype) == (torch.bfloat16, torch.float32)
