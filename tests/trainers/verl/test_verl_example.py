"""examples/trainers/verl: its data, reward and settings, as verl reads them. Training itself wants a GPU."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import verl.trainer.config
from hydra import compose, initialize_config_dir
from places import DEMO_MODEL, EXAMPLES
from transformers import AutoTokenizer
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

from trainer_hooks.verl.mode import replay_mode

FOLDER = EXAMPLES / "trainers" / "verl"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("verl")
    module.prepare(folder, train=8, test=4)
    return folder


@pytest.fixture(scope="module")
def config(prepared):
    command = [str(FOLDER / "train.sh"), str(prepared), "trainer.total_training_steps=3"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True, check=True)
    module, *overrides = done.stdout.split()[1:]
    assert module == "verl.trainer.main_ppo"
    with initialize_config_dir(str(Path(verl.trainer.config.__file__).parent), version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def test_the_settings_are_those_of_verl(config):
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert replay_mode(omega_conf_to_dataclass(config.actor_rollout_ref.actor.fsdp_config)) == "R3"
    assert config.trainer.total_training_steps == 3


def test_prompts_are_those_that_the_model_learnt(config, prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    data = RLHFDataset(data_files=config.data.train_files, tokenizer=tokenizer, config=config.data)
    assert len(data) == 8
    messages = data[0]["raw_prompt"]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == AutoTokenizer.from_pretrained(DEMO_MODEL)(messages[0]["content"]).input_ids


def test_the_reward(config):
    reward = get_custom_reward_fn(config)
    judge = dict(data_source="chain_sum", ground_truth="12", extra_info={})
    assert reward(solution_str="It is <answer>12</answer>", **judge) == 1.0
    assert reward(solution_str="It is <answer>-12</answer>", **judge) == 0.0
