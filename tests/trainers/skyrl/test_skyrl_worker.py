"""SkyRL's policy worker with replay: its own collation, micro-batches, model and methods, against plain forwards."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rollouts import (
    DP_SIZE,
    of_samples,
    oracle,
    plain_logprobs,
    samples,
    scored,
    settings,
    training_batch,
    training_batch_of,
)
from skyrl.backends.skyrl_train.utils.packed_tensor import PackedTensor
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPPolicyWorkerBase, FSDPRefWorkerBase
from skyrl.backends.skyrl_train.workers.worker_utils import BaseBatchIterator, TokenBasedBatchIterator
from skyrl.train.trainer import RayPPOTrainer
from trainers.conformance import (
    EQUAL,
    captured_rows,
    check_gap,
    check_identical,
    check_live,
    check_replayed,
    furthest,
    rollouts_oracle,
    sampled_rollouts,
)
from workers import bare_worker, policy_worker, wrapper

import r3
from r3.capture import SamplingMask
from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorkerBase

pytestmark = pytest.mark.usefixtures("cpu")

SAMPLES, TOKENS = (), ("trainer.max_tokens_per_microbatch=30",)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
microbatches = pytest.mark.parametrize("more", [SAMPLES, TOKENS], ids=["by samples", "by tokens"])


@pytest.fixture(scope="module")
def plain():
    return oracle()


def old_logprobs(worker, batch):
    """As SkyRL's dispatch does: a part of the batch for each rank, one after the other here."""
    parts = batch.chunk(len(batch) // DP_SIZE)
    outputs = [row["logprobs"] for part in parts for row in worker.forward(part).loss_fn_outputs]
    return of_samples(batch, torch.tensor(outputs))


def trained(worker, batch):
    """Log-probabilities of the training forward, and gradients."""
    output = worker.forward_backward(batch)
    logprobs = [
        torch.tensor(row["logprobs"]) for row in output.loss_fn_outputs[: len(of_samples(batch, batch["rewards"]))]
    ]
    return logprobs, {name: p.grad.clone() for name, p in worker.model.model.named_parameters() if p.grad is not None}


@layouts
@microbatches
def test_every_forward_is_replayed(plain, packed, more):
    cfg = settings(*more)
    worker, batch = policy_worker(cfg, packed), training_batch(cfg)
    check_replayed(scored(plain, old_logprobs(worker, batch), trained(worker, batch)[0]))


def test_skyrls_own_mismatch_falls_to_a_third(monkeypatch):
    """By the method of SkyRL's trainer, which chooses what of a batch a worker gets; beside rollouts of vLLM's."""
    rollouts = sampled_rollouts()
    count = len(rollouts) // 2  # prompts
    sizes = (f"trainer.train_batch_size={count}", f"trainer.policy_mini_batch_size={count}")
    cfg = settings("trainer.recompute_old_logprobs_per_minibatch=true", *sizes)
    batch = training_batch_of(
        cfg,
        {
            "prompt_token_ids": [each.prompt_ids for each in rollouts],
            "response_ids": [each.token_ids for each in rollouts],
            "rewards": [0.0] * len(rollouts),
            "loss_masks": [[1] * len(each.token_ids) for each in rollouts],
            "rollout_logprobs": [each.logprobs.tolist() for each in rollouts],
            "rollout_expert_indices": [captured_rows(each).numpy() for each in rollouts],
        },
    )
    worker = policy_worker(cfg)
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)
    trainer.cfg, trainer.all_metrics, trainer.ref_model = cfg, {}, None
    trainer.dispatch = SimpleNamespace(
        stage_data=lambda model, data, boundaries: [[data[start:end]] for start, end in boundaries],
        forward_from_staged=lambda model, parts: worker.forward(parts[0]),
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(RayPPOTrainer, "has_critic", False)
    got = trainer.fwd_logprobs_values_reward(batch)
    old = of_samples(got, got["action_log_probs"])
    sampled = {(*each.prompt_ids, *each.token_ids): each.logprobs for each in rollouts}
    forward = rollouts_oracle(rollouts).scored(zip(sampled, old, strict=True), sampled)
    check_replayed([forward])
    live = torch.cat([(live - engine).abs() for _, live, engine in forward.sampled])
    check_gap(trainer.all_metrics["policy/rollout_train_logprobs_abs_diff_mean"], live.mean().item())


@layouts
@microbatches
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointed", "checkpointed reentrant"])
def test_training_is_on_replayed_forwards(plain, packed, more, reentrant):
    cfg = settings(*more)
    batch = training_batch(cfg)
    worker = policy_worker(cfg, packed)
    if reentrant is not None:
        worker.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got, grads = trained(worker, batch)
    check_replayed(scored(plain, got, got))

    plain.model.zero_grad()
    loss = 0.0
    parts = [of_samples(batch, batch[name]) for name in ("action_log_probs", "advantages", "loss_mask")]
    for logprobs, old, advantages, mask in zip(plain_logprobs(plain), *parts, strict=True):
        loss = (
            loss
            + worker.policy_loss_fn(
                logprobs[None], old[None], advantages[None], config=cfg.trainer.algorithm, loss_mask=mask[None]
            )[0]
        )
    loss.backward()
    wanted = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys()
    assert any("gate" in name for name in wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-7)


@layouts
def test_skyrls_own_sample_support_goes_with_replay(packed):
    """What SkyRL carries where top_k or top_p cut: replayed routing, and log-probabilities over the ids."""
    cfg = settings(
        "trainer.algorithm.enable_sample_support_replay=true",
        "generator.inference_engine.enable_return_sample_support_set=true",
        "generator.sampling_params.top_k=4",
    )
    supports = [support_of(response) for _, response, _ in samples()]
    sets = {
        (*prompt, *response): SamplingMask.of((support >= 0).sum(1), support[support >= 0], response, first=len(prompt))
        for (prompt, response, _), support in zip(samples(), supports, strict=True)
    }
    plain = oracle(sets)
    worker, batch = policy_worker(cfg, packed), training_batch(cfg, rollout_sample_support=supports)
    check_replayed(scored(plain, old_logprobs(worker, batch), trained(worker, batch)[0]))


def support_of(response):
    """int32 `[G, 4]`: each token among up to 3 others, filled up by -1."""
    support = np.full((len(response), 4), -1, np.int32)
    for row, token in zip(support, response, strict=True):
        row[: 1 + token % 4] = [token, *range(300, 300 + token % 4)]
    return support


@layouts
def test_a_loss_without_gradients_is_on_replayed_forwards(plain, packed):
    cfg = settings()
    output = policy_worker(cfg, packed).forward(training_batch(cfg), loss_fn="cross_entropy")
    got = [torch.tensor(row["logprobs"]) for row in output.loss_fn_outputs[:6]]
    check_replayed(scored(plain, got, got))


@layouts
def test_micro_batches_that_only_keep_ranks_in_step_change_nothing(plain, packed, monkeypatch):
    cfg = settings(*TOKENS)
    batch = training_batch(cfg)
    alone, grads = trained(policy_worker(cfg, packed), batch)
    monkeypatch.setattr(TokenBasedBatchIterator, "_sync_num_microbatches", lambda self: len(self._microbatches) + 2)
    worker = policy_worker(cfg, packed)
    filled, filled_grads = trained(worker, batch)
    assert worker._feed.replay.last.rows_replayed == 0, "the last micro-batch was a filling"
    assert furthest(filled, alone) < EQUAL
    for name, grad in grads.items():
        torch.testing.assert_close(filled_grads[name], grad)
    check_replayed(scored(plain, old_logprobs(worker, batch), filled))


def test_training_needs_no_old_logprobs(plain):
    cfg = settings("trainer.algorithm.policy_loss_type=rollout_is")
    batch = training_batch(cfg)
    batch["action_log_probs"] = None  # SkyRL leaves out the forward that would make them
    got, _ = trained(policy_worker(cfg), batch)
    check_replayed(scored(plain, got, got))


def test_lora_is_replayed(plain):
    cfg = settings()
    worker = policy_worker(cfg, lora_rank=4, target_modules="all-linear")
    batch = training_batch(cfg)
    old, (got, grads) = old_logprobs(worker, batch), trained(worker, batch)
    check_replayed(scored(plain, old, got))  # an adapter begins as nothing
    assert grads
    assert all("lora" in name for name in grads)


def test_the_reference_is_live(plain):
    cfg = settings()
    batch = training_batch(cfg)
    policy_worker(cfg)
    reference = bare_worker(FSDPRefWorkerBase, cfg)
    reference.model = wrapper()
    old = old_logprobs(reference, batch)
    check_live(scored(plain, old, old))


def test_the_policy_of_skyrl_alone_is_untouched():
    """Beside a policy that replays: the same numbers, bit for bit, as before r3 was attached to anything."""
    cfg = settings()
    batch = training_batch(cfg)
    alone = policy_worker(cfg, cls=FSDPPolicyWorkerBase)
    before = old_logprobs(alone, batch), trained(alone, batch)
    policy_worker(cfg)
    again = policy_worker(cfg, cls=FSDPPolicyWorkerBase)
    check_identical((old_logprobs(again, batch), trained(again, batch)), before)


@pytest.mark.parametrize("name", ["rollout_expert_indices", "router_padding_mask"])
def test_the_policy_runs_no_forward_without_rows(name):
    cfg = settings()
    batch = training_batch(cfg)
    batch[name] = None
    worker = policy_worker(cfg)
    for run in (worker.forward, worker.forward_backward, lambda data: worker.forward(data, loss_fn="cross_entropy")):
        with pytest.raises(r3.ReplayError, match="rollout_expert_indices and router_padding_mask, got none"):
            run(batch)
    worker.model.train()
    part = batch.chunk(2)[0]
    with pytest.raises(r3.ReplayError, match="training forward"):
        worker.model(part["sequences"], 3, attention_mask=part["attention_mask"])


def test_rows_of_other_tokens_are_an_error():
    cfg = settings()
    worker = policy_worker(cfg)
    batch = training_batch(cfg)
    rows = batch["rollout_expert_indices"]
    lengths = rows.sequence_lengths.tolist()
    lengths[0], lengths[1] = lengths[1], lengths[0]
    batch["rollout_expert_indices"] = PackedTensor.from_segments(list(rows.values.split(lengths)))
    with pytest.raises(r3.RoutingError, match=r"a row for each token, \[13, 21, 7\] by sample, got \[21, 13, 7\]"):
        worker.forward(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[:, 0], r"expected \[T, L, K\], got"),
        (lambda values: values[:, :5], "L = 8 layers"),
        (lambda values: values[..., :3], "K = 4"),
        (lambda values: values + 30, r"not 4 distinct expert ids in \[0, 32\)"),
    ],
)
def test_rows_of_another_model_are_an_error(change, message):
    cfg = settings()
    batch = training_batch(cfg)
    rows = batch["rollout_expert_indices"]
    batch["rollout_expert_indices"] = PackedTensor(change(rows.values), rows.cu_seqlens)
    with pytest.raises(r3.RoutingError, match=message):
        policy_worker(cfg).forward(batch)


def test_a_policy_that_was_made_without_replay_is_an_error(monkeypatch):
    monkeypatch.setattr(FSDPPolicyWorkerBase, "init_model", lambda self, path, steps: None)
    with pytest.raises(r3.ReplayError, match="not attached"):
        bare_worker(RoutingReplayPolicyWorkerBase, settings()).init_model("model", 1)


def test_gpt_oss_is_refused():
    cfg = settings()
    model = wrapper().model
    model.config.model_type = "gpt_oss"
    with pytest.raises(r3.ConfigError, match=r"gpt-oss.*attention"):
        bare_worker(RoutingReplayPolicyWorkerBase, cfg)._seq_parallel_monkey_patch(model=model)


def test_dummy_ids_are_not_replayed():
    """SkyRL fills up with experts 0 to K-1, which look like a choice."""
    cfg = settings()
    batch = training_batch(cfg)
    worker = policy_worker(cfg)
    experience = BaseBatchIterator.batch_to_experience(batch)
    worker._forward_backward_micro(experience, 1.0)
    captured = int((~batch["router_padding_mask"]).sum())
    assert captured < int(batch["attention_mask"].sum())
    assert worker._feed.replay.last.rows_replayed == captured
