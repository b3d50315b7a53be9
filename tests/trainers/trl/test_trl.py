"""TRL's GRPO and RLOO trainers with a real colocated engine: what reaches the loss is what the engine did."""

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig
from places import DEMO_MODEL
from trainers.conformance import check_identical, check_live, check_refused, check_replayed
from trl_runs import PROMPTS, TRAINERS, check, trainer, varied

import r3
from trainer_hooks import trl as hooks

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_engine")]


def test_grpo_replays_through_accumulation_iterations_and_shuffling(tmp_path):
    made = trainer(
        tmp_path,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        max_completion_length=24,
        gradient_checkpointing=True,
        mask_truncated_completions=True,
    )
    made.train()
    check(made.scored, made.state.log_history)
    assert sum(each.in_loss for each in made.scored) == 8
    log = [line for line in made.state.log_history if "loss" in line]
    assert all(line["routing/replayed_frac"] > 0.9 for line in log if "routing/replayed_frac" in line)
    assert all(line["aux_loss"] > 0 for line in log)
    assert made.vllm_generation.llm.collective_rpc("r3_status")[0]["state"] == "idle"


def test_rloo_replays(tmp_path):
    made = trainer(tmp_path, kind="rloo", beta=0.05)
    made.train()
    check(made.scored, made.state.log_history)
    check_live([each for each in made.scored if each.reference])


def test_a_reference_model_is_live(tmp_path):
    made = trainer(tmp_path, beta=0.04, max_steps=1)
    made.train()
    check(made.scored, made.state.log_history)
    check_live([each for each in made.scored if each.reference])


def test_lora_replays_and_its_reference_is_live(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    made = trainer(tmp_path, given={"peft_config": lora}, beta=0.04, learning_rate=1e-3)
    made.train()
    # No gap: with an adapter of random weights the policy is another than the engine has in bfloat16.
    check_replayed(made.scored)
    references = [each for each in made.scored if each.reference]
    assert len(references) == 2
    check_live(references)


def test_evaluation_is_live(tmp_path):
    made = trainer(
        tmp_path,
        given={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:4]})},
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    made.train()
    check(made.scored, made.state.log_history)
    assert sum("eval_loss" in line for line in made.state.log_history) == 2
    evaluated = [each for each in made.scored if not each.training]
    assert len(evaluated) >= 4
    check_live(evaluated)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_off_is_bit_identical_to_trl(tmp_path, kind):
    """Without an engine, whose sampling would differ: transformers generates."""
    settings = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        seed=3,
    )
    upper = kind.upper()

    def run(module, **more):
        config = getattr(module, f"{upper}Config")(**settings, **more)
        made = getattr(module, f"{upper}Trainer")(
            model=str(DEMO_MODEL),
            reward_funcs=varied,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )
        made.train()
        log = [
            {k: v for k, v in line.items() if not k.endswith(("time", "runtime", "per_second"))}
            for line in made.state.log_history
        ]
        return log, {name: value.clone() for name, value in made.model.state_dict().items()}

    check_identical(run(hooks, moe_enable_routing_replay=False), run(trl))


@pytest.mark.parametrize(
    ("settings", "given", "setting", "cure"),
    [
        ({"use_vllm": False}, {}, "use_vllm=False: ", "Set use_vllm=True"),
        ({}, {"rollout_func": lambda prompts, trainer: {}}, "rollout_func", "Use tools or environment_factory"),
        ({"generation_kwargs": {"n": 2}}, {}, "generation_kwargs: n", "Set num_generations"),
        ({"vllm_model_impl": "transformers"}, {}, "vllm_model_impl", "Leave it at .vllm."),
    ],
)
def test_what_would_be_wrong_is_refused_before_an_engine_starts(tmp_path, settings, given, setting, cure):
    with check_refused(setting, cure):
        trainer(tmp_path, given=given, **settings)


def test_a_trl_that_has_moved_is_refused_by_name(tmp_path, monkeypatch):
    def moved(self, batch, model):
        raise AssertionError

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", moved)
    monkeypatch.setattr(hooks.RoutingReplayMixin, "_compute_loss", moved)
    with pytest.raises(r3.ConfigError, match=r"_compute_loss: expected parameters model, inputs, got batch"):
        trainer(tmp_path)


def test_rows_that_are_not_numbered_stop_the_loss(tmp_path, monkeypatch):
    class Renaming(hooks.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            del batch["routing_rows"]
            return batch

    monkeypatch.setitem(TRAINERS, "grpo", (Renaming, hooks.GRPOConfig))
    with pytest.raises(r3.ReplayError, match="numbered by the last generation"):
        trainer(tmp_path).train()
