"""The recipe of examples/trainers/skyrl, as far as a CPU goes: settings, problems, the environment, and SkyRL's
generator with an engine that is a stand-in. Then what the generator made, through collation and the policy worker."""

import asyncio
import shlex
from types import SimpleNamespace

import pytest
import skyrl_gym
import torch
from places import EXAMPLES
from rollouts import of_samples, settings, training_batch_of
from skyrl.train.dataset import PromptDataset
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl_gym.envs.base_text_env import BaseTextEnv
from trainers.conformance import Oracle, check_replayed, plain_model, rows_of
from transformers import AutoTokenizer
from workers import policy_worker

from trainer_hooks.skyrl.config import validate_cfg
from trainer_hooks.skyrl.entry_point import parsed

FOLDER = EXAMPLES / "trainers" / "skyrl"
SAYS = " 96 plus 21 is 117. <answer>{}</answer><|end|>"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder that prepare.py writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import prepare

        folder = tmp_path_factory.mktemp("skyrl")
        prepare.write_model(folder / "model")
        prepare.write_problems(folder / "train.jsonl", count=4, seed=0)
        skyrl_gym.register(id="chain_sum", entry_point="chain_sum_env:ChainSumEnv")
        skyrl_gym.register(id="told", entry_point="test_skyrl_recipe:Told")
        yield folder


class Told(BaseTextEnv):
    """A conversation: after the first answer the model is told something, then answers again."""

    def step(self, action):
        self.turns += 1
        told = [] if self.turns == 2 else [{"role": "user", "content": " 48 plus 23?"}]
        return {"observations": told, "reward": 1.0, "done": self.turns == 2, "metadata": {}}

    def __init__(self, env_config=None, extras=None):
        super().__init__()


class Engine:
    """A stand-in for SkyRL's inference client: says the same each time, and routes by token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = []

    async def finish_session(self, session):
        pass

    async def generate(self, request, model=None):
        prompt, start = request["prompt_token_ids"][0], request["routed_experts_prompt_starts"][0]
        self.asked.append(start)
        response = self.tokenizer(SAYS.format(len(self.asked))).input_ids
        return {
            "responses": [self.tokenizer.decode(response)],
            "response_ids": [response],
            "stop_reasons": ["stop"],
            "response_logprobs": [[-1.0] * len(response)],
            "rollout_expert_indices": [rows_of(prompt + response)[start:-1].numpy()],
        }


def recipe():
    """The arguments of the recipe in README.md."""
    text = (FOLDER / "README.md").read_text()
    block = text.split("examples/trainers/skyrl/train.py \\\n")[1].split("\n\n")[0]
    return shlex.split(block.replace("\\\n", " "))


def test_the_recipes_settings_are_valid():
    cfg = parsed(recipe())
    validate_cfg(cfg)
    assert cfg.trainer.policy.fsdp_config.moe_enable_routing_replay


def test_problems_are_read_and_answers_are_judged(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    data = PromptDataset([str(prepared / "train.jsonl")], tokenizer, max_prompt_length=128, num_workers=1)
    assert len(data) == 4
    prompt, name, extras, _ = data[0]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text.startswith("State the final answer to the following arithmetic problem: ")
    assert text.endswith(" =\n")
    answer = extras["reward_spec"]["ground_truth"]
    for said, reward in ((f"<answer>{answer}</answer>", 1.0), (f"<answer>{answer}1</answer>", 0.0), (answer, 0.0)):
        assert skyrl_gym.make(name, env_config={}, extras=extras).step(said)["reward"] == reward


@pytest.mark.parametrize("task", ["chain_sum", "told"])
@pytest.mark.usefixtures("cpu")
def test_rows_stay_with_their_tokens_from_the_generator_to_the_policy(prepared, task):
    cfg = settings("generator.batched=false", "generator.max_turns=2", "generator.n_samples_per_prompt=1")
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    engine = Engine(tokenizer)
    generator = SkyRLGymGenerator(cfg.generator, cfg.environment.skyrl_gym, engine, tokenizer, "model")
    ask = [[{"role": "user", "content": f"What is {number}? =\n"}] for number in ("96 + 21", "1 + 2 + 305", "7")]
    output = asyncio.run(
        generator.generate(
            {
                "prompts": ask,
                "env_classes": [task] * 3,
                "env_extras": [{"reward_spec": {"ground_truth": "1"}} for _ in ask],
                "trajectory_ids": [SimpleNamespace(instance_id=str(i), repetition_id=0) for i in range(3)],
            },
            disable_tqdm=True,
        )
    )
    assert any(start > 0 for start in engine.asked) == (task == "told")
    batch = training_batch_of(cfg, output)
    worker = policy_worker(cfg, packed=True)
    got = torch.tensor([row["logprobs"] for row in worker.forward(batch).loss_fn_outputs])

    ids = [
        tuple(prompt + said) for prompt, said in zip(output["prompt_token_ids"], output["response_ids"], strict=True)
    ]
    plain = Oracle(plain_model(), {each: rows_of(each)[:-1] for each in ids})
    check_replayed([plain.scored(zip(ids, of_samples(batch, got)[:3], strict=True))])
