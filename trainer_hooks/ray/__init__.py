"""r3's GRPO trainer on a Ray cluster: trainer ranks by Ray Train, engines as actors, one command for many nodes.

Limits:

1. Trainer ranks and engines have GPUs of their own, and an engine's GPUs are on one node.
2. The cluster has its nodes already: no autoscaler is waited for.
3. No Ray client (`ray://`): the driver runs on a node of the cluster, as `ray job submit` runs it.
"""

from trainer_hooks.ray.job import train_on_ray

__all__ = ["train_on_ray"]
