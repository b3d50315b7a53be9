"""TRL's trainers where top_k, top_p or min_p cut what was sampled from: all of it is over the engine's own sets."""

import pytest
import torch
from peft import LoraConfig
from trainers.conformance import Oracle, check_live, check_refused, check_replayed, furthest, plain_model, plain_weights
from trl_runs import TRAINERS, WatchedGRPO, check, trainer

import r3
from trainer_hooks import trl as hooks
from trainer_hooks.trl.engine import require_server_logprobs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_engine")]

CUT = dict(top_k=50, top_p=0.7, temperature=1.3)


def sizes_of(made) -> torch.Tensor:
    sizes = torch.cat([mask.sizes for mask in made.sets.values()])
    return sizes[sizes > 0]


def test_old_and_new_logprobs_are_over_the_sets_through_accumulation_iterations_and_masks(tmp_path, one_engine):
    made = trainer(
        tmp_path,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        max_completion_length=24,
        gradient_checkpointing=True,
        mask_truncated_completions=True,
        **CUT,
    )
    made.train()
    assert one_engine[-1]["max_logprobs"] == 54
    check(made.scored, made.state.log_history)
    assert sum(each.in_loss for each in made.scored) == 8
    sizes = sizes_of(made)
    assert 1 == int(sizes.min()) < int(sizes.max()) <= 50
    log = [line for line in made.state.log_history if "rollout/set_size_mean" in line]
    assert log
    assert all(line["rollout/set_size_mean"] > 1 > line["rollout/set_single_frac"] > 0 for line in log)


def test_positions_without_a_label_may_be_left_out(tmp_path, monkeypatch):
    """As TRL does on GPUs, with completions that are in no loss among them."""
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    made = trainer(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_completion_length=24,
        mask_truncated_completions=True,
        beta=0.05,
        **CUT,
    )
    made.train()
    check(made.scored, made.state.log_history)
    check_live([each for each in made.scored if each.reference])


def test_rloo_and_its_reference_are_over_the_sets(tmp_path):
    made = trainer(tmp_path, kind="rloo", beta=0.05, top_k=8, min_p=0.05)
    made.train()
    check(made.scored, made.state.log_history)
    check_live([each for each in made.scored if each.reference])
    assert int(sizes_of(made).max()) <= 8


def test_the_reference_of_lora_is_over_the_sets(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    made = trainer(tmp_path, given={"peft_config": lora}, beta=0.04, max_steps=1, generation_kwargs=dict(top_k=20))
    made.train()
    check_replayed(made.scored)
    check_live([each for each in made.scored if each.reference])


class Kept(WatchedGRPO):
    """Keeps the inputs of the last loss."""

    def _compute_loss(self, model, inputs):
        self.inputs = inputs
        return super()._compute_loss(model, inputs)


def test_gradients_and_entropy_are_those_of_a_float64_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(TRAINERS, "grpo", (Kept, hooks.GRPOConfig))
    made = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, **CUT)
    made.train()
    inputs, rows = made.inputs, made._placed.select(made.inputs["routing_rows"][:, 1].tolist())
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    keep = inputs["completion_ids"].shape[1]

    def gradients(weights):
        """Log-probabilities, entropy, and the gradients of their weighted sum in the trainer's model."""
        made._loss_rows = rows
        made.model.train()
        made.model.zero_grad()
        logps, entropies, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, keep, compute_entropy=True)
        made._loss_rows = None
        (logps * weights).sum().backward()
        return logps.detach(), entropies, {name: p.grad.clone() for name, p in made.model.named_parameters()}

    weights = torch.randn(len(ids), keep, generator=torch.Generator().manual_seed(0)) * inputs["completion_mask"]
    logps, entropies, got = gradients(weights)

    oracle = Oracle(plain_model(plain_weights(made.model)), made.rows, made.sets)
    oracle.model.set_experts_implementation("eager")  # the others have no float64
    oracle.model.double().train()
    wanted_logps, wanted_entropies = [], []
    for row, attended, weight in zip(ids, mask.bool(), weights, strict=True):
        known = row[attended]
        scores = oracle.distributions(known, replayed=True, temperature=made.temperature)
        completion = int(attended[-keep:].sum())
        wanted = scores.gather(-1, known[1:, None])[-completion:, 0]
        (wanted * weight[:completion]).sum().backward()
        wanted_logps.append(wanted.detach())
        wanted_entropies.append(torch.special.entr(scores.exp()).sum(-1)[-completion:].detach())
    lengths = [len(each) for each in wanted_logps]
    assert furthest([row[:n].double() for row, n in zip(logps, lengths, strict=True)], wanted_logps) < 1e-5
    assert furthest([row[:n].double() for row, n in zip(entropies, lengths, strict=True)], wanted_entropies) < 1e-5
    assert got.keys() == dict(oracle.model.named_parameters()).keys()
    for name, parameter in oracle.model.named_parameters():
        assert (got[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max(), name

    alone = rows.sampling_mask.sizes[:, -keep:] == 1
    assert alone.any()
    assert not logps[alone].any()
    _, _, none = gradients(alone.float())
    assert not any(gradient.any() for gradient in none.values())


@pytest.mark.parametrize(
    ("settings", "setting", "cure"),
    [
        (dict(top_p=0.9), "top_p or min_p without top_k", "Set top_k"),
        (dict(generation_kwargs={"min_p": 0.1}), "top_p or min_p without top_k", "Set top_k"),
        (dict(top_k=20, generation_kwargs={"temperature": 0.5}), "generation_kwargs: temp", "temperature itself"),
        (dict(top_k=20, entropy_coef=0.01), "entropy_coef", "Leave the bonus off"),
    ],
)
def test_what_would_be_over_other_sets_is_refused_before_an_engine_starts(
    tmp_path, one_engine, settings, setting, cure
):
    engines = len(one_engine)
    with check_refused(setting, cure):
        trainer(tmp_path, **settings)
    assert len(one_engine) == engines


def test_an_engine_that_is_asked_for_less_stops_the_step(tmp_path):
    with pytest.raises(r3.CaptureError, match=r"the set may be larger. Ask for logprobs of top_k \+ 4"):
        trainer(tmp_path, top_k=20, generation_kwargs={"logprobs": 5}).train()


def test_a_server_that_gives_less_is_refused():
    require_server_logprobs(54, 54)
    require_server_logprobs(-1, 54)
    with pytest.raises(r3.ConfigError, match=r"expected 54 or more.*got 20. Start it with --max-logprobs 54"):
        require_server_logprobs(20, 54)


def test_forwards_that_go_around_the_sets_stop_the_loss(tmp_path, monkeypatch):
    from trl.trainer import utils

    monkeypatch.setattr("trainer_hooks.trl.head._SetHead.apply", utils._ChunkedLogProbFunction.apply)
    with pytest.raises(r3.ReplayError, match="score all tokens of its rows over their sets"):
        trainer(tmp_path, max_steps=1, **CUT).train()
