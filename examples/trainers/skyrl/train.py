"""SkyRL's training with routing replay on the demo's task. Arguments are SkyRL's own: see README.md.

An environment of one's own is registered inside the Ray task, hence a task of one's own around `RoutingReplayExp`.
"""

import sys

import ray
from skyrl.train.utils.utils import initialize_ray
from skyrl_gym.envs import register

from trainer_hooks.skyrl import require_skyrl
from trainer_hooks.skyrl.config import RoutingReplayConfig, validate_cfg
from trainer_hooks.skyrl.entry_point import RoutingReplayExp


@ray.remote(num_cpus=1)
def task(cfg: RoutingReplayConfig) -> None:
    register(id="chain_sum", entry_point="chain_sum_env:ChainSumEnv")  # Ray's processes find this folder's modules
    RoutingReplayExp(cfg).run()


def main() -> None:
    require_skyrl()
    cfg = RoutingReplayConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(task.remote(cfg))


if __name__ == "__main__":
    main()
