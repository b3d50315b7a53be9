"""SkyRL's entry point, with replaying policy workers where replay is on."""

from collections.abc import Sequence
from typing import Any

import ray
from skyrl.backends.skyrl_train.workers.fsdp import fsdp_worker
from skyrl.train.entrypoints import main_base
from skyrl.train.utils.utils import initialize_ray

from r3.errors import ConfigError
from trainer_hooks.skyrl.config import RoutingReplayConfig, replay_is_on, validate_cfg
from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorker, RoutingReplayPolicyWorkerBase

_OVERRIDE = "trainer.override_entrypoint="


class RoutingReplay:
    """For an experiment of SkyRL: `class Experiment(RoutingReplay, BasePPOExp)` has policy workers that replay."""

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        """SkyRL's trainer, which builds replaying policy workers in place of SkyRL's."""
        trainer = super().get_trainer(*args, **kwargs)  # type: ignore[misc]
        build = trainer.build_models

        def build_models(policy_worker: Any, critic_worker: Any, ref_worker: Any) -> None:
            build(_replaying(policy_worker), critic_worker, ref_worker)

        trainer.build_models = build_models
        return trainer


class RoutingReplayExp(RoutingReplay, main_base.BasePPOExp):
    """SkyRL's experiment with policy workers that replay."""


@ray.remote(num_cpus=1)
def routing_replay_entrypoint(cfg: RoutingReplayConfig) -> None:
    """SkyRL's `skyrl_entrypoint`, with policy workers that replay."""
    RoutingReplayExp(cfg).run()


def run(arguments: Sequence[str]) -> None:
    """Parse, validate and train, as SkyRL's `main` does."""
    cfg = parsed(arguments)
    validate_cfg(cfg)
    initialize_ray(cfg)
    entry_point = routing_replay_entrypoint if replay_is_on(cfg) else main_base.skyrl_entrypoint
    ray.get(entry_point.remote(cfg))


def parsed(arguments: Sequence[str]) -> RoutingReplayConfig:
    """Settings of command line arguments."""
    # What named this module as the entry point is no setting of SkyRL's.
    return RoutingReplayConfig.from_cli_overrides([word for word in arguments if not word.startswith(_OVERRIDE)])


def _replaying(policy_worker: Any) -> Any:
    if policy_worker is not fsdp_worker.PolicyWorker:
        raise ConfigError(
            f"policy worker: expected SkyRL's own of FSDP, got {policy_worker}. Derive yours from "
            f"{RoutingReplayPolicyWorkerBase.__name__} and build it with an experiment of your own"
        )
    return RoutingReplayPolicyWorker
