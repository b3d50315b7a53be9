"""swift's GRPO pipeline with r3's trainer and a stand-in for the engine: each forward is replayed as it should."""

import json
import math

import pytest
import torch
from swift_runs import PROMPTS, run, sequences
from trainers.conformance import (
    EQUAL,
    Oracle,
    check_identical,
    check_live,
    check_refused,
    check_replayed,
    plain_model,
    plain_weights,
)

import r3


def log_of(made):
    timing = ("time", "runtime", "per_second", "(s/it)")
    return [{k: v for k, v in line.items() if not k.endswith(timing)} for line in made.state.log_history]


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_iterations=2),
        dict(padding_free=True, num_iterations=2),
        dict(padding_side="left", max_steps=1),
        dict(steps_per_generation=4, gradient_checkpointing=True),
        dict(dynamic_sample=True, max_resample_times=2, max_steps=1),
    ],
    ids=["padded", "padding_free", "left", "gradient_checkpointing", "dynamic_sample"],
)
def test_replays(tmp_path, settings):
    made = run(tmp_path, **settings)
    assert made.template.padding_free == settings.get("padding_free", False)
    assert made.template.padding_side == settings.get("padding_side", "right")
    check_replayed(made.scored)
    assert sum(each.in_loss for each in made.scored) == 2 * made.state.max_steps
    assert all(line["routing/replayed_frac"] > 0.9 for line in log_of(made) if "routing/replayed_frac" in line)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_iterations=2, top_k=20, top_p=0.9),
        dict(padding_free=True, num_iterations=2, top_k=20),
        dict(padding_side="left", top_k=5, min_p=0.1, beta=0.04, max_steps=1, gradient_checkpointing=True),
        dict(tuner_type="lora", lora_dropout=0.0, beta=0.04, learning_rate=1e-3, top_k=20),
    ],
    ids=["padded", "padding_free", "left", "lora"],
)
def test_what_was_cut_is_cut_in_training(tmp_path, settings):
    """Log-probabilities of policy and reference are over the sets of the engine: 1 to 7 ids that it made up."""
    made = run(tmp_path, temperature=0.7, **settings)
    check_replayed(made.scored)
    if "beta" in settings:
        check_live([each for each in made.scored if each.reference])
    for line in log_of(made):
        if "rollout/set_size_mean" in line:
            assert 7 > line["rollout/set_size_mean"] > 1 > line["rollout/set_single_frac"] > 0
    assert any("rollout/set_size_mean" in line for line in log_of(made))


def test_sets_that_do_not_come_stop_the_step(tmp_path):
    with pytest.raises(r3.ReplayError, match=r"swift's samples came without their sets"):
        run(tmp_path, spoil=lambda response: delattr(response.choices[0], "sampling_sets"), top_k=20)


def test_a_teacher_with_a_prompt_of_its_own_is_live_and_refused_where_the_policy_is_cut(tmp_path):
    """It would be over the whole vocabulary: swift collates its rows anew, without sets."""
    data = tmp_path / "taught.jsonl"
    lines = [{"messages": [{"role": "user", "content": each}], "teacher_prompt": f"x{each}"} for each in PROMPTS]
    data.write_text("\n".join(map(json.dumps, lines)))
    settings = dict(dataset=[str(data)], remove_unused_columns=False, max_steps=1)
    made = run(tmp_path, **settings)
    taught = [each for each in made.scored if math.isnan(each.replayed)]  # of no sequence that the engine knows
    assert taught
    assert all(each.live < EQUAL and not each.in_loss for each in taught)
    check_replayed([each for each in made.scored if not math.isnan(each.replayed)])
    with pytest.raises(r3.ReplayError, match=r"forward in training without `sampling_sets`.*teacher_prompt"):
        run(tmp_path, top_k=20, **settings)


def test_a_reference_model_is_live(tmp_path):
    made = run(tmp_path, beta=0.04, max_steps=1)
    check_replayed(made.scored)
    references = [each for each in made.scored if each.reference]
    assert len(references) == 2
    check_live(references)


def test_lora_replays_and_its_reference_is_live(tmp_path):
    made = run(tmp_path, tuner_type="lora", lora_dropout=0.0, beta=0.04, learning_rate=1e-3)
    assert hasattr(made.model, "peft_config")
    check_replayed(made.scored)
    references = [each for each in made.scored if each.reference]
    assert len(references) == 4
    check_live(references)


def test_evaluation_is_live_and_leaves_training_alone(tmp_path):
    evaluation = dict(eval_strategy="steps", eval_steps=1, split_dataset_ratio=0.5, per_device_eval_batch_size=4)
    made = run(tmp_path, max_steps=1, **evaluation)
    check_replayed(made.scored)
    check_live([each for each in made.scored if not each.training])


@pytest.mark.parametrize("settings", [{}, dict(top_k=20)], ids=["whole", "cut"])
def test_gradients_and_entropy_are_those_of_the_plain_replayed_model(tmp_path, settings):
    made = run(tmp_path, max_steps=1, **settings)
    batch = made._buffered_inputs[0]
    mask = batch["grpo_batch"].completion_mask
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    made.model.train()
    made.model.zero_grad()
    logps, entropies = made._get_per_token_logps_and_entropies(
        made.model, dict(batch["model_inputs"]), batch["grpo_batch"], compute_entropy=True
    )
    (logps * weights).sum().backward()

    known = made.known
    sets = {ids: each.sets for ids, each in known.items() if each.sets}
    oracle = Oracle(plain_model(plain_weights(made.model)), {ids: each.rows for ids, each in known.items()}, sets)
    rows = zip(sequences(batch["model_inputs"]), weights, entropies, mask, strict=True)
    for ids, row, entropy, here in rows:
        scores = oracle.distributions(ids, replayed=True)[known[ids].prompt - 1 :]
        own = scores.gather(-1, torch.tensor(ids)[known[ids].prompt :, None])[:, 0]
        (own * row[here]).sum().backward()
        torch.testing.assert_close(entropy[here], torch.special.entr(scores.exp()).sum(-1), rtol=1e-4, atol=1e-5)
    gates = 0
    for (name, parameter), (_, other) in zip(
        made.model.named_parameters(), oracle.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
        gates += "gate.weight" in name and parameter.grad.abs().max() > 0
    assert gates == 8


@pytest.fixture
def deterministic():
    """Without it swift alone ends with other weights each time, by some 1e-6: gradients are summed in other orders."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("padding_free", [False, True])
def test_off_is_bit_identical_to_swift(tmp_path, padding_free):
    settings = dict(padding_free=padding_free, learning_rate=1e-3)
    plain = run(tmp_path, trainer="PlainGRPO", **settings)
    off = run(tmp_path, vllm_engine_kwargs={"enable_return_routed_experts": False}, **settings)
    assert off.replay is None
    assert "grad_norm" in log_of(plain)[0]
    check_identical((log_of(off), off.model.state_dict()), (log_of(plain), plain.model.state_dict()))


@pytest.mark.parametrize(
    ("settings", "named", "cure"),
    [
        (dict(use_vllm=False, vllm_mode=None), "use_vllm false", "Set --use_vllm true --vllm_mode colocate"),
        (dict(tuner_type="lora", vllm_enable_lora=True), "vllm_enable_lora", "Leave it off"),
        (dict(multi_turn_scheduler="math_tip_trick"), "multi_turn_scheduler", "Train on single turns"),
    ],
)
def test_refused_at_start_by_name(tmp_path, settings, named, cure):
    with check_refused(f"routing replay in ms-swift:\n.*{named}: ", cure):
        run(tmp_path, **settings)


def other_token(response):
    response.choices[0].token_ids[0] ^= 2


def other_prompt(response):
    response.prompt_token_ids[0] ^= 2


def no_rows(response):
    response.choices[0].routed_experts = None


def row_missing(response):
    response.choices[0].routed_experts = response.choices[0].routed_experts[1:]


def row_damaged(response):
    response.choices[0].routed_experts[3, 2] = 5


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_prompt, "sample 0: expected the .* tokens that the engine read and sampled"),
        (no_rows, "sample 0: no routing: the engine does not return it"),
        (row_missing, "sample 0: expected integer routing"),
        (row_damaged, r"sample 0: [\s\S]*position 3, decoder layer 2"),
    ],
)
def test_what_the_engine_did_not_do_is_not_trained_on(tmp_path, spoil, says):
    with pytest.raises(r3.R3Error, match=says):
        run(tmp_path, spoil=spoil)


def test_a_forward_without_rows_raises(tmp_path):
    made = run(tmp_path, max_steps=1)
    batch = made._buffered_inputs[0]
    made.model.train()
    inputs = {name: value for name, value in batch["model_inputs"].items() if name != "routed_experts"}
    with pytest.raises(r3.ReplayError, match="forward of the policy in training without `routed_experts`"):
        made._get_per_token_logps_and_entropies(made.model, inputs, batch["grpo_batch"])
    with pytest.raises(r3.ReplayError, match="without routing"):
        made.model(input_ids=inputs["input_ids"])


def test_a_swift_that_moved_is_refused(tmp_path, monkeypatch):
    from swift.rlhf_trainers import grpo_trainer

    collate = grpo_trainer.collate_to_grpo_micro_batch
    monkeypatch.setattr(grpo_trainer, "collate_to_grpo_micro_batch", lambda batch: collate(batch))
    with pytest.raises(r3.ConfigError, match=r"ms-swift 4\.\d+.*moved[\s\S]*collate_to_grpo_micro_batch"):
        run(tmp_path)


def test_prompts_differ_in_length():
    """Else padding would not be tested."""
    assert len({len(prompt) for prompt in PROMPTS}) == 3
