"""The demo's task for SkyRL: one answer between <answer> tags, right or wrong."""

import re
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ChainSumEnv(BaseTextEnv):
    """Reward 1 if the last answer is the sum, else 0. One turn."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.answer = (extras or {})["reward_spec"]["ground_truth"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        found = _ANSWER.findall(action)
        reward = float(bool(found) and found[-1].strip() == self.answer)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
