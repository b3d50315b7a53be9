"""The loss of a micro-batch, as `trainer.algorithm` has it: the clipped objective under a correction of the gap.

p is the policy that is trained, p_old the trainer's own before the first update of the step, p_rollout the engine's,
each of one sampled token; A is the token's advantage, and `clip` PPO's min(r A, clip(r, 1 - low, 1 + high) A).

    correction    objective of a token        r                               w, a constant
    none          clip(r, A)                  p / p_rollout
    tis           w clip(r, A)                p / p_old                       min(p_old / p_rollout, high)
    mis           w clip(r, A)                p / p_old                       p_old / p_rollout, 0 above high
    icepop        w clip(r, A)                p / p_old                       the same, 0 outside [low, high]
    gspo          clip(s, A)                  s: that of its sequence, exp of the mean of log p / p_rollout

The loss is the negative mean over all sampled tokens of the update, dropped ones included; with `gspo` the mean over
its sequences of the means over their tokens, as its paper has it. `kl_coef` adds that multiple of the KL to the
reference (`kl_to_reference`), averaged alike and without w. The weights are those of
`r3.diagnostics.corrections`, which names their sources. `gspo` takes the ratio to the rollout and not to p_old: its
paper proposes that to do without a second computation (Zheng et al. 2025, arXiv 2507.18071, section 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from r3.config import AlgorithmConfig
from r3.diagnostics import CorrectionSums, gspo, icepop, masked_importance, truncated_importance
from r3.diagnostics.corrections import Correction
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.objective import clipped_loss, kl_to_reference

OWN_RATIO = ("tis", "mis", "icepop")
"""Corrections with weights of p_old."""


@dataclass(frozen=True, kw_only=True)
class MicroLoss:
    """Attributes:
    total: scalar, sum over this rank's tokens; divided by the update's tokens it is this rank's part of the loss.
    clipped: how many tokens have ratios outside the clip bounds.
    correction: what the correction did; None without one.
    kl: sum of the KL to the reference over this rank's tokens, in nats; None without a reference.
    """

    total: Tensor
    clipped: Tensor
    correction: CorrectionSums | None = None
    kl: Tensor | None = None


class PolicyLoss:
    """The loss of the micro-batches of one update.

    Args:
        algorithm: which.
        update: the rollouts of the update, the same on every rank.
        samples: rollouts of the step.
        group: ranks that share rows; None where each has its own.
    """

    def __init__(
        self, algorithm: AlgorithmConfig, update: StepBatch, *, samples: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.algorithm = algorithm
        self.samples = samples
        self.group = group
        self.share = _sequence_share(update, samples) if algorithm.correction == "gspo" else None

    def __call__(self, rows: Rows, logprobs: Tensor, old: Tensor, reference: Tensor | None = None) -> MicroLoss:
        """Of `rows`.

        Args:
            logprobs: `[R, N]` in nats, of the policy that is trained.
            old: `[R, N]`, of the trainer's policy before the first update of the step; used by `OWN_RATIO` alone.
            reference: `[R, N]`, of the reference policy; None without one.

        Raises:
            DiagnosticsError: log-probabilities that are not finite, if there is a correction.
        """
        algorithm = self.algorithm
        correction = self._correction(rows, logprobs, old)
        share = None if self.share is None else self.share.to(logprobs.device)[rows.sample_ids].to(logprobs.dtype)
        weights = share
        if correction is None:
            ratio = (logprobs - rows.logprobs).exp()
        elif algorithm.correction == "gspo":
            ratio = correction.weights.where(rows.mask, 1)
        else:
            ratio, weights = (logprobs - old).exp(), correction.weights
        total, clipped = clipped_loss(
            ratio, rows.advantages, low=algorithm.eps_clip_low, high=algorithm.eps_clip_high, weights=weights
        )
        kl = None
        if reference is not None:
            by_token = kl_to_reference(logprobs, reference)
            total = total + algorithm.kl_coef * (by_token if share is None else by_token * share).sum()
            kl = by_token.detach().sum()
        return MicroLoss(
            total=total, clipped=clipped, correction=None if correction is None else correction.sums, kl=kl
        )

    def _correction(self, rows: Rows, logprobs: Tensor, old: Tensor) -> Correction | None:
        algorithm, sides = self.algorithm, (old, rows.logprobs, rows.mask)
        by_sequence = {"sequence_ids": rows.sample_ids, "count": self.samples, "group": self.group}
        if algorithm.correction == "none":
            return None
        if algorithm.correction == "gspo":
            return gspo(logprobs, rows.logprobs, rows.mask, **by_sequence)
        if algorithm.correction == "icepop":
            given = {"low": algorithm.correction_low, "high": algorithm.correction_high}
            return icepop(*sides, **{name: bound for name, bound in given.items() if bound is not None})
        function = truncated_importance if algorithm.correction == "tis" else masked_importance
        level = algorithm.correction_level
        if level == "token":
            return function(*sides, level="token", clip=algorithm.correction_high)
        return function(*sides, level="sequence", clip=algorithm.correction_high, **by_sequence)


def _sequence_share(update: StepBatch, samples: int) -> Tensor:
    """float64 `[samples]`: tokens of the update over its sequences times a sequence's own tokens; 0 for all others.

    Times this, a mean over the update's tokens is one over its sequences of the means over their tokens.
    """
    lengths = update.batch.response_mask.sum(1).double()
    share = lengths.sum() / ((lengths > 0).sum() * lengths)
    return torch.zeros(samples, dtype=torch.float64).index_put_(
        (update.sample_ids,), share.masked_fill(lengths == 0, 0)
    )
