"""verl's FSDP engine with R3: every sample is trained on the routing of its own tokens, in each of verl's layouts."""

from functools import partial
from typing import Any

import pytest
import torch
from trainers.conformance import (
    APART,
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
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.workers.engine import FSDPEngineWithLMHead
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding
from verl_jobs import (
    SeenLoss,
    batch,
    configs,
    engine,
    filled,
    furthest_gradient,
    gradients,
    logprobs,
    oracle,
    reference,
    reference_on_ranks,
    rows_of,
    samples,
    scored,
    scored_on_ranks,
)

from trainer_hooks.verl.engine import RoutingReplayEngine

GRADIENT = 1e-4
LAYOUTS = {
    "packed, dynamic": {},
    "packed, two samples": dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=2),
    "padded, dynamic": dict(use_remove_padding=False),
    "padded, two samples": dict(use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2),
}


@pytest.fixture(scope="module")
def replaying(one_rank):
    return engine("R3", model={"enable_gradient_checkpointing": True})


@pytest.fixture(scope="module")
def wanted():
    ids = samples()
    return reference(ids, [rows_of(part) for part in ids])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_sample_is_replayed(replaying, wanted, layout):
    ids = samples()
    rows = [rows_of(part) for part in ids]
    data = partial(batch, ids, rows, **layout)
    old, (grads, loss) = logprobs(replaying, data()), gradients(replaying, data())
    check_replayed(scored(oracle(ids, rows), ids, old, loss))
    assert len(loss.seen) == len(ids)
    assert furthest_gradient(grads, wanted[1]) < GRADIENT


def test_padding_to_buckets(one_rank, wanted):
    ids = samples()
    made = engine("R3", pad_to_length=True, pad_to_length_bucket=32)
    assert furthest(logprobs(made, batch(ids, [rows_of(part) for part in ids])), wanted[0]) < EQUAL


def test_samples_without_routing_are_live(replaying):
    """verl fills up a batch with synthetic samples, and agents may return a sample without routing: zeros."""
    ids = samples()
    rows = [rows_of(part) for part in ids]
    template, _ = construct_minimal_padding_template({"routed_experts": rows[0], "prompts": ids[0]}, {}, 7)
    ids, rows = [*ids, template["input_ids"]], [*rows, template["routed_experts"]]
    rows[1] = torch.zeros_like(rows[1])
    want, _ = reference(ids, rows)
    data = partial(batch, ids, rows, max_token_len_per_gpu=200)
    assert furthest(logprobs(replaying, data()), want) < EQUAL
    with replaying.eval_mode():
        metrics = replaying.infer_batch(data())["metrics"]
    replayed = sum(len(ids[at]) - 1 for at in (0, 2, 3))
    assert metrics["actor/replayed_rows"] == pytest.approx([replayed / sum(map(len, ids))])


def test_rows_as_the_agent_loop_returns_them(replaying):
    """The engine's P + G - 1 rows, through verl's own filling."""
    ids = samples((13, 21))
    outputs = [
        AgentLoopOutput(
            prompt_ids=part[:5].tolist(),
            response_ids=part[5:].tolist(),
            response_mask=[1] * (len(part) - 5),
            routed_experts=rows_of(part)[:-1].numpy(),
            metrics={},
        ).as_dict()
        for part in ids
    ]
    rows = [output["routed_experts"] for output in outputs]
    got = logprobs(replaying, batch([torch.cat([o["prompts"], o["responses"]]) for o in outputs], rows))
    want, _ = reference(ids, [rows_of(part) for part in ids])
    assert furthest(got, want) < EQUAL


def test_left_padded_batch_reordered_by_the_trainer(replaying):
    """The other trainer: prompts padded left, responses right, samples in another order than they came."""
    ids, prompt, response = samples(), 8, 20
    rows = [rows_of(part) for part in ids]

    def place(part: torch.Tensor) -> torch.Tensor:
        """A prompt of five tokens that ends at `prompt`."""
        whole = part.new_zeros((prompt + response, *part.shape[1:]))
        whole[prompt - 5 : prompt - 5 + len(part)] = part
        return whole

    mask = torch.stack([place(torch.ones_like(part)) for part in ids])
    padded = DataProto.from_dict(
        tensors=dict(
            input_ids=torch.stack([place(part) for part in ids]),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            response_mask=mask[:, prompt:],
            routed_experts=torch.stack([place(part) for part in rows]),
        )
    )
    order = torch.tensor([2, 0, 3, 1])
    padded.reorder(order)
    data = left_right_2_no_padding(padded.to_tensordict())
    tu.assign_non_tensor(data, use_dynamic_bsz=True, max_token_len_per_gpu=40, temperature=1.0, calculate_entropy=False)
    want, _ = reference([ids[at] for at in order], [rows[at] for at in order])
    assert furthest(logprobs(replaying, data), want) < EQUAL


def train(made: Any, data: Any) -> dict:
    """One update towards likelier samples."""
    with made.train_mode():
        return made.train_batch(data, lambda model_output, **_: (-model_output["log_probs"].values().mean(), {}))


def worker(mode: str, **settings: Any) -> TrainingWorker:
    made = TrainingWorker(config=TrainingWorkerConfig(model_type="language_model", **configs(mode, **settings)))
    made.reset()
    return made


def test_shuffled_mini_batches_of_the_worker(one_rank):
    made = worker("R3", lr=0.0)
    ids = [part for shift in range(2) for part in (torch.roll(each, shift) for each in samples())]
    loss, rows = SeenLoss(), [rows_of(part) for part in ids]
    made.set_loss_fn(loss)
    data = batch(ids, rows)
    tu.assign_non_tensor(data, mini_batch_size=4, epochs=2, seed=3, dataloader_kwargs={"shuffle": True})
    made.train_mini_batch(data)
    assert len(loss.seen) == 16
    assert [len(part) for part, _ in loss.seen[:8]] != [len(part) for part, _ in loss.seen[8:]]  # shuffled anew
    check_replayed([oracle(ids, rows).scored(loss.seen)])


@pytest.mark.parametrize("sequence_size", [1, 2], ids=["data parallel", "Ulysses"])
@pytest.mark.parametrize("pad_to_length", [False, True])
def test_two_ranks(two_ranks, sequence_size, pad_to_length):
    """The second rank starts from a model on meta. Ulysses with sdpa, which verl by itself does not split."""
    settings = dict(pad_to_length=pad_to_length, pad_to_length_bucket=32)
    for forwards, gradient in two_ranks.all(scored_on_ranks, sequence_size, settings):
        check_replayed(forwards)
        assert gradient < GRADIENT


def test_lora_is_replayed_and_its_reference_live(one_rank):
    made = engine("R3", model=dict(lora_rank=4, target_modules=["q_proj", "v_proj"]), lr=1e-2)
    ids = samples()
    rows = [rows_of(part) for part in ids]
    want, _ = reference(ids, rows)
    assert furthest(logprobs(made, batch(ids, rows)), want) < EQUAL  # a new adapter adds nothing
    train(made, batch(ids, rows))
    assert furthest(logprobs(made, batch(ids, rows)), want) > APART
    plain = oracle(ids, rows)
    with made.disable_adapter():
        for data in (batch(ids, rows), batch(ids, None)):
            check_live([plain.scored(zip(ids, logprobs(made, data), strict=True))])
    assert made.replay.last is None


def test_a_reference_engine_is_live(one_rank, monkeypatch):
    # verl offloads a reference to pinned memory, which wants a GPU.
    offload = partial(transformer_impl.CPUOffloadPolicy, pin_memory=False)
    monkeypatch.setattr(transformer_impl, "CPUOffloadPolicy", lambda pin_memory: offload())
    made = engine("R3", forward_only=True)
    ids = samples()
    rows = [rows_of(part) for part in ids]
    assert made.replay is None
    check_live([oracle(ids, rows).scored(zip(ids, logprobs(made, batch(ids, rows)), strict=True))])


def test_a_reference_with_ulysses_is_split_where_the_mode_is_set(two_ranks):
    check_live(two_ranks.all(reference_on_ranks, "R3"))
    by_itself = two_ranks.all(reference_on_ranks, "disabled")  # without FlashAttention
    assert max(each.live for each in by_itself) > APART


def test_old_logprobs_and_update_agree(replaying):
    """Whatever the batch size: the ratio of the first update is 1."""
    ids = samples()
    rows = [rows_of(part) for part in ids]
    old = logprobs(replaying, batch(ids, rows, max_token_len_per_gpu=200))
    loss = SeenLoss()
    with replaying.train_mode():
        replaying.forward_backward_batch(batch(ids, rows, use_dynamic_bsz=False, micro_batch_size_per_gpu=4), loss)
    assert furthest([part for _, part in loss.seen], old) < EQUAL


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_verls_own_mismatch_falls_to_a_third(replaying, layout):
    """Beside rollouts of vLLM's; verl counts probabilities."""
    rollouts = sampled_rollouts()
    ids = [torch.tensor(each.prompt_ids + each.token_ids) for each in rollouts]
    responses = torch.tensor([each.token_ids for each in rollouts])

    def own(parts: list[torch.Tensor]) -> float:
        tensors = dict(
            rollout_log_probs=torch.stack([each.logprobs for each in rollouts]),
            old_log_probs=torch.stack([part[-responses.shape[1] :] for part in parts]),
            responses=responses,
            response_mask=torch.ones_like(responses),
        )
        return calculate_debug_metrics(DataProto.from_dict(tensors=tensors))["training/rollout_probs_diff_mean"]

    rows = [filled(captured_rows(each)) for each in rollouts]
    data = batch(ids, rows, **{"max_token_len_per_gpu": 200} | layout)
    plain = rollouts_oracle(rollouts)
    with torch.no_grad():
        live = [plain.logprobs(part, replayed=False) for part in ids]
    check_gap(own(logprobs(replaying, data)), own(live))


def train_twice(cls: type, **settings: Any) -> tuple:
    made = cls(**configs("disabled", **settings))
    made.initialize()
    results = []
    for _ in range(2):
        output = train(made, batch(samples(), None))
        results += [output["metrics"]["grad_norm"], *output["loss"], *logprobs(made, batch(samples(), None))]
    return results, [name for name, _ in made.module.named_parameters()], list(made.module.state_dict())


def test_without_the_mode_verl_is_untouched(one_rank):
    ours, theirs = train_twice(RoutingReplayEngine), train_twice(FSDPEngineWithLMHead)
    check_identical(ours, theirs)


def test_replay_changes_no_names_that_are_sent_to_the_rollout(replaying):
    plain = FSDPEngineWithLMHead(**configs("disabled"))
    plain.initialize()
    assert [name for name, _ in replaying.get_per_tensor_param()[0]] == [
        name for name, _ in plain.get_per_tensor_param()[0]
    ]
