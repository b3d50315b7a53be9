"""What GRPO maximises: advantages within a group, and the clipped objective of tokens. Pure functions of tensors."""

import torch
from torch import Tensor

ADVANTAGE_EPS = 1e-4


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO advantages: rewards `[prompts, samples]` less the prompt's mean, over its standard deviation.

    Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation for outcome supervision; a small constant keeps groups
    whose rewards are all equal at 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + ADVANTAGE_EPS)


def clipped_objective(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate by token, to be maximised: min(r A, clip(r, 1 - low, 1 + high) A)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_loss(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the negative objective, and how many tokens have ratios outside the bounds.

    The ratio is to the policy that sampled: to the rollout's own log-probabilities, not to the trainer's idea of them.
    Where there is no label, all three are 0: nothing is added to either.

    Args:
        logprobs: `[R, N]` in nats, of the policy that is trained.
        rollout_logprobs: `[R, N]`, of the same tokens when they were sampled.
        advantages: `[R, N]`.
        low, high: ratios from 1 - low to 1 + high are within the bounds.
    """
    ratio = (logprobs - rollout_logprobs).exp()
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).sum()
    return -clipped_objective(ratio, advantages, low, high).sum(), outside
