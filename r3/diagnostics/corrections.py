"""Corrections of the gap between train and rollout, from the two log-probabilities of the same sampled tokens.

d = train - rollout log-probability, nats: exp(d) is the ratio of a token, and exp of the sum of d that of a sequence.

1. Only the weights of `gspo` carry a gradient. All others are constants of the loss: importance weights and masks
   change under which distribution the expectation is taken, not what is optimised.
2. What a correction drops has weight 0 and is False in its mask. Whether a mean is then taken over the tokens that are
   left or over all is the loss's choice.
3. Sequences are the rows of `[B, S]`, or given by `sequence_ids`, int64 of the tensors' shape: in [0, `count`) where
   the mask is True, anything elsewhere. All tokens of a sequence have to be in one call, or in the same call of the
   ranks of `group` (Ulysses), each of which has to make it: their totals are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from r3.diagnostics.correction_sums import CorrectionSums
from r3.diagnostics.logprobs import pair_problems
from r3.diagnostics.sequences import sequence_totals
from r3.errors import DiagnosticsError, summary

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["token", "sequence"]

CLIPS = {"token": 2.0, "sequence": 5.0}
MAX_BOUND = math.exp(20.0)
"""Weights up to here, and their squares, are far inside the range of float32."""
GSPO_MAX = math.exp(10.0)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What to multiply a loss by, and which tokens to leave in it.

    `weights` has the shape of `train`, is float64 if that is and float32 otherwise, and is 0 where `mask` is False.
    `mask` is bool, True for the tokens of the mask that was given and that are not dropped. `sums` are the metrics of
    this call; merge them over micro-batches and ranks.
    """

    weights: Tensor
    mask: Tensor
    sums: CorrectionSums


def truncated_importance(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    level: Level = "token",
    clip: float | None = None,
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Truncated importance sampling: the weight is min(ratio, clip). Nothing is dropped; no gradient.

    The ratio is the token's, or with `level="sequence"` the sequence's at each of its tokens. `clip` is 2.0 for tokens
    and 5.0 for sequences unless given.

    `train` and `rollout` are floating-point tensors of one shape, in nats; `mask` is bool of that shape. Raises
    `DiagnosticsError` for unequal shapes, other dtypes, bounds that make no sense, and log-probabilities that are not
    finite where `mask` is True; the last, at the level of sequences, on all ranks of `group`.

    Ionides 2008, "Truncated Importance Sampling"; for this gap: Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training". TRL `token_truncate` and `sequence_truncate`, SkyRL `tis_ratio_type`, verl
    `rollout_is`, slime `vanilla_tis_function`.

    >>> train, rollout = torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
    >>> truncated_importance(train, rollout, torch.tensor([[True, True]])).weights
    tensor([[2., 1.]])
    """
    ratios = _ratios(train, rollout, mask, level, sequence_ids, count, group)
    return _correct("truncated_importance", ratios, high=_clip(level, clip), drops=False)


def masked_importance(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    level: Level = "token",
    clip: float | None = None,
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Masked importance sampling: the weight is the ratio, and what is above `clip` is dropped; no gradient.

    Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch". TRL
    `token_mask` and `sequence_mask`. Arguments, defaults and errors as in `truncated_importance`.
    """
    ratios = _ratios(train, rollout, mask, level, sequence_ids, count, group)
    return _correct("masked_importance", ratios, high=_clip(level, clip), drops=True)


def icepop(train: Tensor, rollout: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 5.0) -> Correction:
    """IcePop: the weight is the token's ratio, and tokens with a ratio outside [low, high] are dropped; no gradient.

    Ling Team 2025, "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model", arXiv
    2510.18855. slime `icepop_function`, verl `rollout_is_threshold` with two bounds. Errors as in
    `truncated_importance`.
    """
    return _correct("icepop", _ratios(train, rollout, mask), low=low, high=high, drops=True)


def geometric_mask(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    low: float = 0.99,
    high: float = 1.01,
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Drops sequences with a geometric mean of ratios, exp of the mean of d, outside [low, high].

    The others have weight 1; no gradient. Does not depend on the length, but deviations of opposite signs cancel.

    Liu et al. 2025 (as in `masked_importance`), part 3. SkyRL `sequence_mask_metric=geometric`; verl `seq_mean_k1`,
    whose bounds are of the inverse ratio. Arguments and errors as in `truncated_importance`.
    """
    ratios = _ratios(train, rollout, mask, "sequence", sequence_ids, count, group, mean=True)
    return _correct("geometric_mask", ratios, low=low, high=high, drops=True, ones=True)


def product_mask(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    low: float = 0.5,
    high: float = 2.0,
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Drops sequences with a ratio outside [low, high].

    The others have weight 1; no gradient. The longer a sequence, the likelier it is dropped.

    SkyRL `sequence_mask_metric=product`; verl `seq_sum_k1`, whose bounds are of the inverse ratio. Arguments and errors
    as in `truncated_importance`.
    """
    ratios = _ratios(train, rollout, mask, "sequence", sequence_ids, count, group)
    return _correct("product_mask", ratios, low=low, high=high, drops=True, ones=True)


def gspo(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    *,
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """GSPO's ratio s of a sequence, exp of the mean of d, at each of its tokens. **Carries the gradient of `train`.**

    The form is that of GSPO-token: sg[s] p / sg[p], p being the token's probability under `train` and sg stopping the
    gradient. The value is s, the gradient s times that of the token's own log-probability. Its mean over the tokens of
    a sequence has the gradient of s, so for one advantage a sequence this is GSPO exactly, and no rank of `group` needs
    a gradient of another. `rollout` gets none.

    Above e**10, s is constant, without gradient, and counts as clipped, as in verl. It takes the place of the ratio in
    PPO's clipped objective, with much closer bounds: the paper's are 1 - 3e-4 and 1 + 4e-4.

    Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv 2507.18071. verl `loss_mode=gspo`, TRL
    `importance_sampling_level="sequence"`. Arguments and errors as in `truncated_importance`.
    """
    ratios = _ratios(train, rollout, mask, "sequence", sequence_ids, count, group, mean=True)
    found = _correct("gspo", ratios, high=GSPO_MAX, drops=False)
    own = train.to(found.weights.dtype).where(mask & (ratios.logs <= math.log(GSPO_MAX)), 0)
    return Correction(weights=found.weights * (own - own.detach()).exp(), mask=found.mask, sums=found.sums)


@dataclass(frozen=True, kw_only=True)
class _Ratios:
    """Logarithms of ratios, float64: of the tensors' shape, 0 outside the mask; and by sequence `[n]`, if they are of
    sequences. The first rank of a group has them all and the others none, so that each counts once.
    """

    logs: Tensor
    mask: Tensor
    dtype: torch.dtype
    by_sequence: Tensor | None = None


def _correct(
    method: str, ratios: _Ratios, *, low: float = 0.0, high: float, drops: bool, ones: bool = False
) -> Correction:
    """Clips or drops what is outside the bounds; the bounds themselves are inside. `ones`: all weights are 1."""
    if not 0 <= low < high <= MAX_BOUND:
        raise DiagnosticsError(f"{method}: expected bounds of a ratio, 0 <= low < high <= e**20, got {low} and {high}")
    least, most = math.log(low) if low else -math.inf, math.log(high)

    def beyond(logs: Tensor) -> Tensor:
        return (logs < least) | (logs > most)

    outside = ratios.mask & beyond(ratios.logs)
    kept = ratios.mask & ~outside if drops else ratios.mask
    weights = torch.ones_like(ratios.logs) if ones else ratios.logs.clamp(least, most).exp()
    weights = weights.where(kept, 0)
    by_sequence = ratios.logs.new_zeros(0) if ratios.by_sequence is None else ratios.by_sequence
    counts = [ratios.mask.sum(), outside.sum(), beyond(by_sequence).sum()]
    totals = torch.stack([count.double() for count in counts] + [weights.sum(), weights.square().sum()]).tolist()
    sums = CorrectionSums(
        method=method,
        low=low,
        high=high,
        drops=drops,
        by_sequence=ratios.by_sequence is not None,
        tokens=int(totals[0]),
        outside_tokens=int(totals[1]),
        sequences=by_sequence.numel(),
        outside_sequences=int(totals[2]),
        weight_sum=totals[3],
        weight_square_sum=totals[4],
    )
    return Correction(weights=weights.to(ratios.dtype), mask=kept, sums=sums)


def _ratios(
    train: Tensor,
    rollout: Tensor,
    mask: Tensor,
    level: Level = "token",
    sequence_ids: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    mean: bool = False,
) -> _Ratios:
    if problems := pair_problems(train, rollout, mask):
        raise DiagnosticsError(f"correction cannot be computed:{summary(problems)}")
    dtype = torch.float64 if train.dtype == torch.float64 else torch.float32
    diff = train.detach().double().where(mask, 0) - rollout.detach().double().where(mask, 0)
    if level == "token":
        if not diff.isfinite().all():
            raise DiagnosticsError(_not_finite(diff))
        return _Ratios(logs=diff, mask=mask, dtype=dtype)
    ids, count = _sequences(mask, sequence_ids, count)
    try:
        sums, counts = sequence_totals(diff, mask, ids, count, group)  # raises on all ranks of the group, if on one
    except DiagnosticsError as error:
        if diff.isfinite().all():
            raise
        raise DiagnosticsError(_not_finite(diff)) from error
    logs = sums / counts.clamp_min(1) if mean else sums
    first = group is None or dist.get_rank(group) == 0
    return _Ratios(
        logs=logs[ids.where(mask, 0)].where(mask, 0) if count else diff,
        mask=mask,
        dtype=dtype,
        by_sequence=logs[counts > 0] if first else logs[:0],
    )


def _sequences(mask: Tensor, ids: Tensor | None, count: int | None) -> tuple[Tensor, int]:
    """The id of each token's sequence, and how many sequences there are."""
    if ids is None:
        if mask.dim() != 2 or count not in (None, mask.shape[0]):
            raise DiagnosticsError(
                f"sequences: expected rows [B, S] of one sequence each, or sequence_ids and their count, got shape "
                f"{list(mask.shape)} and count {count}"
            )
        return torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape), mask.shape[0]
    if count is None:
        raise DiagnosticsError("sequence_ids: expected their count with them, got none; pass count=")
    return ids, count


def _clip(level: Level, clip: float | None) -> float:
    if level not in CLIPS:
        raise DiagnosticsError(f"level: expected one of {', '.join(CLIPS)}, got {level!r}")
    return CLIPS[level] if clip is None else clip


def _not_finite(diff: Tensor) -> str:
    found = summary(f"at {place}" for place in (~diff.isfinite()).nonzero().tolist())
    return f"log-probabilities: expected finite ones where the mask is True, got others:{found}\nmask out such tokens"
