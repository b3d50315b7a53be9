"""r3 in TRL: `from trainer_hooks.trl import GRPOTrainer` in place of `from trl import GRPOTrainer`.

Rollouts come with their routing, training replays it, and the weight sync is complete or raises. All else is TRL's own.
`moe_enable_routing_replay=False` (of the configuration or the trainer) leaves TRL as it is.
"""

from dataclasses import dataclass, field

import trl

from trainer_hooks.trl.trainer import RoutingReplayMixin

_HELP = {"help": "Replay the experts that the rollouts used, and sync weights by r3."}


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """`trl.GRPOConfig` with one setting more.

    Attributes:
        moe_enable_routing_replay: replay the experts that the rollouts used, and sync weights by r3.
    """

    moe_enable_routing_replay: bool = field(default=True, metadata=_HELP)


@dataclass
class RLOOConfig(trl.RLOOConfig):
    """`trl.RLOOConfig` with one setting more.

    Attributes:
        moe_enable_routing_replay: replay the experts that the rollouts used, and sync weights by r3.
    """

    moe_enable_routing_replay: bool = field(default=True, metadata=_HELP)


class GRPOTrainer(RoutingReplayMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with routing replay."""


class RLOOTrainer(RoutingReplayMixin, trl.RLOOTrainer):
    """`trl.RLOOTrainer` with routing replay."""


__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer", "RoutingReplayMixin"]
