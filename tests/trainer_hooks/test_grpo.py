"""The arithmetic of the trainer: advantages, the clipped objective, and log-probabilities."""

import contextlib
from dataclasses import replace

import pytest
import torch
from places import DEMO_MODEL
from step_batches import made_batch

import r3
from r3.capture import SamplingMask
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.launch import process_group
from trainer_hooks.objective import clipped_loss, clipped_objective, group_advantages
from trainer_hooks.policy import Policy


def test_advantages_compare_the_samples_of_one_prompt_only():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = group_advantages(rewards)
    assert torch.allclose(found.sum(1), torch.zeros(3), atol=1e-6)
    assert torch.equal(found[2], torch.zeros(4))
    # mean 0.25, standard deviation with n - 1: 0.5; and 1e-4 more
    torch.testing.assert_close(found[1], torch.tensor([-0.25, -0.25, -0.25, 0.75]) / 0.5001, rtol=1e-6, atol=0)


def test_the_objective_stops_pushing_beyond_its_bounds_but_not_back():
    ratio = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    objective = clipped_objective(ratio, advantages, low=0.2, high=0.3)
    torch.testing.assert_close(objective, torch.tensor([0.5, 1.0, 1.3, -0.8, -1.0, -2.0]))
    objective.sum().backward()
    assert ratio.grad.tolist() == [1.0, 1.0, 0.0, 0.0, -1.0, -1.0]


def test_the_loss_is_the_sum_over_tokens_and_counts_those_outside_the_bounds():
    ratios = torch.tensor([[0.5, 0.85, 1.0, 1.25, 2.0], [0.5, 0.85, 1.0, 1.25, 2.0]], dtype=torch.float64)
    sampled = torch.linspace(-3, -1, 10, dtype=torch.float64).view(2, 5)
    logprobs = (sampled + ratios.log()).requires_grad_()
    advantages = torch.tensor([[2.0], [-3.0]], dtype=torch.float64).expand(2, 5)
    loss, outside = clipped_loss((logprobs - sampled).exp(), advantages, low=0.2, high=0.3)
    better, worse = 0.5 + 0.85 + 1.0 + 1.25 + 1.3, 0.8 + 0.85 + 1.0 + 1.25 + 2.0
    assert float(loss.detach()) == pytest.approx(-2 * better + 3 * worse)
    assert int(outside) == 4
    # d r / d log p = r, and 0 beyond the bound that the advantage points to.
    loss.backward()
    expected = [[-1.0, -1.7, -2.0, -2.5, 0.0], [0.0, 2.55, 3.0, 3.75, 6.0]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected, dtype=torch.float64))


def test_weights_multiply_the_objective_of_their_token():
    ratios, advantages = torch.tensor([[0.9, 1.0, 1.1]]), torch.tensor([[2.0, -1.0, 3.0]])
    weights = torch.tensor([[0.5, 2.0, 0.0]])
    loss, outside = clipped_loss(ratios, advantages, low=0.2, high=0.3, weights=weights)
    assert float(loss) == pytest.approx(-(0.9 * 2 * 0.5 - 1.0 * 2))
    assert int(outside) == 0


def test_positions_without_a_label_add_nothing_to_the_loss():
    zeros = torch.zeros(2, 3)
    loss, outside = clipped_loss(zeros.exp(), zeros, low=0.0, high=0.0)
    assert (float(loss), int(outside)) == (0.0, 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_policy_logprobs_are_those_of_a_plain_float32_model_at_the_temperature(replayed, packed):
    from transformers import AutoModelForCausalLM

    config = r3.R3Config.from_overrides(
        [
            "trainer.policy.fsdp_config.param_dtype=float32",
            "generator.sampling_params.temperature=0.5",
            f"trainer.use_sample_packing={packed}",
        ],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )
    batch = made_batch(torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    r3.attach(plain)
    with process_group(), torch.no_grad():
        policy = Policy(config)
        policy.model.eval()
        # Rollout b's log-probabilities are those at advantage b + 1.
        (rows,) = policy.rows(StepBatch.of(batch, torch.arange(3.0) + 1), 3)
        found, rows = policy.logprobs(rows, replayed=replayed).cpu(), rows.to(torch.device("cpu"))
        for b in range(3):
            length = int(batch.attention_mask[b].sum())
            ids = batch.input_ids[b : b + 1, :length]
            routing = {}
            if replayed:
                part = batch.routing.select([b])
                taken = part.expert_ids.long().masked_fill(~part.valid[..., None, None], -1)
                routing = {"routed_experts": taken[:, :length]}
            logits = plain(input_ids=ids, use_cache=False, **routing).logits.double() / 0.5
            expected = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(found[rows.advantages == b + 1].double(), expected[4:], rtol=2e-6, atol=2e-5)
    assert found[~rows.mask].eq(0).all()
    assert rows.input_ids.numel() <= batch.input_ids.numel()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_and_their_slices_keep_what_belongs_together(packed, size):
    batch = made_batch(torch.Generator().manual_seed(1))
    batch.logprobs.copy_(-batch.input_ids.float()).mul_(batch.response_mask)
    ids = batch.input_ids[batch.response_mask].tolist()
    sets = [[token, *range(1000, 1000 + token % 3)] for token in ids]
    sizes = batch.response_mask.long()
    sizes[batch.response_mask] = torch.tensor([*map(len, sets)])
    flat = torch.tensor([token for each in sets for token in each], dtype=torch.int32)
    batch = replace(batch, sampling_mask=SamplingMask(sizes, flat))
    whole = Rows.of(StepBatch.of(batch, torch.arange(3.0) + 1), packed=packed)
    slices = [whole.shard(rank, size) for rank in range(size)]
    labels, mask = (torch.cat([getattr(part, name) for part in slices], 1) for name in ("labels", "mask"))
    # Each sampled token is predicted once, by its own rollout, and its log-probability is beside it.
    assert int(mask.sum()) == int(batch.response_mask.sum())
    assert sorted(labels[mask].tolist()) == sorted(batch.input_ids[batch.response_mask].tolist())
    assert torch.equal(torch.cat([part.logprobs for part in slices], 1)[mask], -labels[mask].float())
    for b in range(3):
        mine = torch.cat([part.advantages for part in slices], 1) == b + 1
        assert labels[mine].tolist() == batch.input_ids[b][batch.response_mask[b]].tolist()
    assert sum(part.routing.rows_valid for part in slices) == batch.routing.rows_valid
    # Each label's set has the label in it, and as many other ids as it was given.
    for part in slices:
        sets = part.sampling_mask.token_ids.split(part.sampling_mask.sizes.flatten().tolist())
        for label, ids in zip(part.labels.flatten().tolist(), sets, strict=True):
            assert ids.tolist() == ([] if label == -100 else [label, *range(1000, 1000 + label % 3)])
    assert sum(int(part.tokens.sum()) for part in slices) == int(batch.attention_mask.sum())


def test_rows_of_other_rollouts_cannot_be_put_together():
    batch = made_batch(torch.Generator().manual_seed(1))
    with pytest.raises(r3.CaptureError, match=r"each of 3 rollouts, got \(2,\)"):
        StepBatch.of(batch, torch.arange(2.0))
    rows = Rows.of(StepBatch.of(batch, torch.arange(3.0)), packed=False)
    with pytest.raises(r3.CaptureError, match=r"routing: \[2, 12, 8, 4\]"):
        replace(rows, routing=batch.routing.select(slice(0, 2)))


def test_the_process_group_is_closed_after_an_exception():
    with contextlib.suppress(LookupError), process_group():
        raise LookupError
    assert not torch.distributed.is_initialized()
