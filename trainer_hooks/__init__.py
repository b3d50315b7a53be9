"""r3 inside trainers: its own GRPO trainer under FSDP2, and the parts of it that other trainers can use."""

from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.evaluation import HeldOut
from trainer_hooks.feed import RoutingFeed
from trainer_hooks.grpo import GRPOTrainer, Task
from trainer_hooks.launch import process_group, train
from trainer_hooks.measure import Measured, StepGap, coverage, measure
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
