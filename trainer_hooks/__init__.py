"""r3 inside trainers: its own GRPO trainer under FSDP2, and the parts of it that other trainers can use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_hooks.batches import Rows, StepBatch
    from trainer_hooks.evaluation import HeldOut
    from trainer_hooks.feed import RoutingFeed
    from trainer_hooks.grpo import GRPOTrainer, Task
    from trainer_hooks.launch import process_group, train
    from trainer_hooks.measurement import Measured, StepGap, coverage, measure
    from trainer_hooks.objective import clipped_loss, clipped_objective, group_advantages
    from trainer_hooks.policy import Policy
    from trainer_hooks.policy_protocol import Scorer
    from trainer_hooks.publish import push_from_all_ranks

__all__ = [
    "GRPOTrainer",
    "HeldOut",
    "Measured",
    "Policy",
    "RoutingFeed",
    "Rows",
    "Scorer",
    "StepBatch",
    "StepGap",
    "Task",
    "clipped_loss",
    "clipped_objective",
    "coverage",
    "group_advantages",
    "measure",
    "process_group",
    "push_from_all_ranks",
    "train",
]

_HOMES = {
    "batches": "Rows StepBatch",
    "evaluation": "HeldOut",
    "feed": "RoutingFeed",
    "grpo": "GRPOTrainer Task",
    "launch": "process_group train",
    "measurement": "Measured StepGap coverage measure",
    "objective": "clipped_loss clipped_objective group_advantages",
    "policy": "Policy",
    "policy_protocol": "Scorer",
    "publish": "push_from_all_ranks",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: hooks are loaded in every process of a trainer, and need little of this.
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"trainer_hooks.{module}"), name)
    raise AttributeError(f"module 'trainer_hooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
