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
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the negative objective, times `weights`, and how many have ratios outside the bounds.

    Where there is no label, the ratio is 1 and the advantage 0: nothing is added to either.

    Args:
        ratio: `[R, N]`, of the policy that is trained to the one before: exp of a difference of log-probabilities.
        advantages: `[R, N]`.
        low, high: ratios from 1 - low to 1 + high are within the bounds.
        weights: `[R, N]`, constants of the loss; None for 1.
    """
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).sum()
    objective = clipped_objective(ratio, advantages, low, high)
    return -(objective if weights is None else objective * weights).sum(), outside


def kl_to_reference(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) by token in nats, from the sampled tokens: exp(d) - 1 - d, with d = reference - policy.

    Never negative, and unbiased where the tokens are sampled from the policy. Schulman 2020, "Approximating KL
    Divergence", estimator k3; as a term of the loss: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 4.

    Args:
        logprobs: `[R, N]`, carries the gradient.
        reference_logprobs: `[R, N]`, of the same tokens.
    """
    diff = reference_logprobs - logprobs
    return diff.expm1() - diff
