"""Evaluation reports the rewards of held-out problems, and training does not notice it."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from places import DEMO_MODEL

import r3
from trainer_hooks.evaluation import evaluate, require_held_out
from trainer_hooks.random_states import seed_engine

GREEDY = {"trainer.eval_every": 1, "trainer.eval_batch_size": 5}


def config_of(**changes):
    defaults = {"trainer.policy.model.path": str(DEMO_MODEL), "generator.sampling_params.max_generate_length": 12}
    return r3.R3Config.from_overrides([], defaults | GREEDY | changes)


class Drawing:
    """A task whose rewards are of what was said, and which draws random numbers for all it is worth."""

    def __init__(self):
        self.said = []

    def eval_problems(self, count):
        random.random()
        return [f"State the final answer to the following arithmetic problem: {i} + 7 =\n" for i in range(count)]

    def prompt(self, problem):
        np.random.rand()  # noqa: NPY002
        return problem

    def reward(self, problem, completion):
        torch.rand(1)
        self.said.append((problem, completion))
        return float(len(completion))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def sample(engine, tokenizer):
    """One completion: what shares a batch with others depends on how requests come in."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": tokenizer(Drawing().eval_problems(1)[0]).input_ids}  # a prefix that evaluation leaves
    given = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, ignore_eos=True)
    (output,) = engine.generate([prompt], given, use_tqdm=False)
    found = output.outputs[0]
    return found.token_ids, [entry[t].logprob for t, entry in zip(found.token_ids, found.logprobs, strict=True)]


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_samples_on_as_if_nothing_had_been_evaluated(engine, tokenizer, temperature):
    def rollouts(between):
        assert engine.reset_prefix_cache()
        for step in (1, 2):
            seed_engine(engine, 7, step)
            yield sample(engine, tokenizer)
            assert engine.reset_prefix_cache()  # as a sync does
            between()

    task = Drawing()
    config = config_of(**{"trainer.eval_temperature": temperature})
    alone = list(rollouts(lambda: None))
    found = []
    assert list(rollouts(lambda: found.append(evaluate(config, task, engine, tokenizer)))) == alone
    assert alone[0] != alone[1]
    problems, texts = zip(*task.said, strict=True)
    assert problems[:5] == problems[5:]
    assert len(set(texts)) > 1
    assert [each["eval/reward"] for each in found] == [sum(map(len, part)) / 5 for part in (texts[:5], texts[5:])]


@pytest.mark.engine
def test_what_is_said_at_temperature_0_is_the_likeliest(engine, tokenizer):
    from vllm import SamplingParams

    task = Drawing()
    evaluate(config_of(), task, engine, tokenizer)
    prompts = [{"prompt_token_ids": tokenizer(problem).input_ids} for problem, _ in task.said]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    said = tokenizer.batch_decode([o.outputs[0].token_ids for o in outputs], skip_special_tokens=True)
    assert said == [text for _, text in task.said]


class Labelled:
    """An engine that says which weights it sampled with, as from vLLM 0.32 on after a sync."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def generate(self, *args, **kwargs):
        outputs = self._engine.generate(*args, **kwargs)
        for completion in (each for output in outputs for each in output.outputs):
            completion.weight_versions = [SimpleNamespace(version="3", start=0, end=len(completion.token_ids))]
        return outputs


@pytest.mark.engine
def test_weights_of_any_version_are_evaluated(engine, tokenizer):
    assert evaluate(config_of(), Drawing(), Labelled(engine), tokenizer)["eval/reward"] > 0


@pytest.mark.engine
def test_random_numbers_of_the_trainer_go_on_as_without_it(engine, tokenizer):
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    def begin():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002

    begin()
    alone = drawn()
    begin()
    evaluate(config_of(), Drawing(), engine, tokenizer)
    assert drawn() == alone


def test_a_task_without_held_out_problems_is_refused_before_anything_starts():
    class Bare:
        pass

    with pytest.raises(r3.ConfigError, match=r"eval_every=1 needs a task with eval_problems\(count\), got Bare"):
        require_held_out(config_of(), Bare())
    require_held_out(config_of(**{"trainer.eval_every": 0}), Bare())
    require_held_out(config_of(), Drawing())


def test_the_last_step_is_evaluated_too():
    trainer = config_of(**{"trainer.eval_every": 4, "trainer.max_steps": 10}).trainer
    assert [step for step in range(1, 11) if trainer.evaluates(step)] == [4, 8, 10]
    assert not config_of(**{"trainer.eval_every": 0}).trainer.evaluates(12)


def test_the_demo_holds_out_what_training_does_not_see():
    from grpo_demo import CHAIN_SUM, ReasoningGymTask

    task = ReasoningGymTask("chain_sum", 0, CHAIN_SUM)
    held = [task.prompt(problem) for problem in task.eval_problems(20)]
    assert held == [task.prompt(problem) for problem in task.eval_problems(20)]
    trained = [task.prompt(problem) for step in range(1, 6) for problem in task.problems(step, 32)]
    assert len(set(held)) == 20
    assert not set(held) & set(trained)
