"""The learning rate by step, from torch's own schedulers."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from r3.config import OptimizerConfig


def lr_schedule(optimizer: Optimizer, settings: OptimizerConfig, *, max_steps: int) -> LRScheduler:
    """A scheduler whose `step` is called after each training step, however many updates that has.

    No step has the rate 0: with w steps of warm-up, step k from 0 has lr (k + 1) / (w + 1) below w, then lr times
    1, 1 - x or (1 + cos(pi x)) / 2, with x = (k - w) / (`max_steps` - w).
    """
    warmup, lasting = settings.warmup_steps, max_steps - settings.warmup_steps
    rising = LinearLR(optimizer, 1 / (warmup + 1), 1.0, total_iters=warmup) if warmup else None
    after: LRScheduler
    if settings.scheduler == "constant":
        after = ConstantLR(optimizer, factor=1.0)
    elif settings.scheduler == "linear":
        after = LinearLR(optimizer, 1.0, 0.0, total_iters=lasting)
    else:
        after = CosineAnnealingLR(optimizer, T_max=lasting)
    return after if rising is None else SequentialLR(optimizer, [rising, after], milestones=[warmup])
