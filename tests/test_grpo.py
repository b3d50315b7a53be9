"""The arithmetic of the trainer: advantages, the clipped objective, and log-probabilities."""

import contextlib

import pytest
import torch
from conftest import DEMO_MODEL

import r3
from r3.capture import RolloutBatch
from trainer_hooks.fsdp import Policy, StepBatch, clipped_objective, group_advantages, process_group


def test_advantages_compare_the_samples_of_one_prompt_only():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = group_advantages(rewards)
    assert torch.allclose(found.sum(1), torch.zeros(3), atol=1e-6)
    assert torch.equal(found[2], torch.zeros(4))
    # mean 0.25, standard deviation with n - 1: 0.5
    torch.testing.assert_close(found[1], torch.tensor([-0.5, -0.5, -0.5, 1.5]), rtol=1e-3, atol=0)


def test_the_objective_stops_pushing_beyond_its_bounds_but_not_back():
    ratio = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    objective = clipped_objective(ratio, advantages, low=0.2, high=0.3)
    torch.testing.assert_close(objective, torch.tensor([0.5, 1.0, 1.3, -0.8, -1.0, -2.0]))
    objective.sum().backward()
    assert ratio.grad.tolist() == [1.0, 1.0, 0.0, 0.0, -1.0, -1.0]


def made_batch(generator: torch.Generator) -> RolloutBatch:
    ids = torch.randint(2, 300, (3, 12), generator=generator)
    attention = torch.ones(3, 12, dtype=torch.int64)
    attention[1, 9:] = 0
    response = attention.bool()
    response[:, :5] = False
    experts = torch.rand(3, 12, 8, 32, generator=generator).argsort(-1)[..., :4]
    valid = attention.bool()
    valid[:, 8] = False
    return RolloutBatch(
        input_ids=ids,
        attention_mask=attention,
        response_mask=response,
        logprobs=torch.zeros(3, 12),
        routing=r3.RolloutRouting(experts, valid, tuple(range(8)), 32),
    )


@pytest.mark.parametrize("replayed", [True, False])
def test_policy_logprobs_are_those_of_a_plain_float32_model_at_the_temperature(replayed):
    from transformers import AutoModelForCausalLM

    config = r3.R3Config.from_overrides(
        ["trainer.policy.fsdp_config.param_dtype=float32", "generator.sampling_params.temperature=0.5"],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )
    batch = made_batch(torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    r3.attach(plain)
    with process_group(), torch.no_grad():
        policy = Policy(config)
        policy.model.eval()
        found = policy.logprobs(batch, replayed=replayed)
        for b in range(3):
            length = int(batch.attention_mask[b].sum())
            ids = batch.input_ids[b : b + 1, :length]
            routing = {}
            if replayed:
                part = batch.routing.select([b])
                rows = part.expert_ids.long().masked_fill(~part.valid[..., None, None], -1)
                routing = {"routed_experts": rows[:, :length]}
            logits = plain(input_ids=ids, use_cache=False, **routing).logits.double() / 0.5
            expected = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(found[b, 5:length].double(), expected[4:], rtol=0, atol=2e-5)
    assert found[~batch.response_mask].eq(0).all()


def test_a_step_is_split_without_losing_a_rollout():
    batch = made_batch(torch.Generator().manual_seed(1))
    parts = list(StepBatch(batch, torch.arange(3.0)).split(2, torch.device("cpu")))
    assert [len(p.advantages) for p in parts] == [2, 1]
    assert torch.equal(torch.cat([p.batch.input_ids for p in parts]), batch.input_ids)
    assert torch.equal(torch.cat([p.batch.routing.expert_ids for p in parts]), batch.routing.expert_ids)


def test_the_process_group_is_closed_after_an_exception():
    with contextlib.suppress(LookupError), process_group():
        raise LookupError
    assert not torch.distributed.is_initialized()
