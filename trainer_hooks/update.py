"""The optimizer steps of one training step, on the rollouts of that step, with their routing replayed.

Gradients are reduced over ranks after each micro-batch. To reduce them once an update (FSDP2's
`set_requires_gradient_sync`) would keep the whole model's float32 gradients on each rank, four bytes a parameter and as
much as all ranks' shards together: more than any GPU has for the models that this is for. Larger micro-batches save the
same communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from r3.config import R3Config
from r3.diagnostics import CorrectionSums
from r3.errors import CaptureError
from r3.parallel import clip_grad_norm
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.measurement import StepGap
from trainer_hooks.policy import Policy
from trainer_hooks.policy_loss import OWN_RATIO, MicroLoss, PolicyLoss


def update(config: R3Config, policy: Policy, whole: StepBatch, gap: StepGap | None = None) -> dict[str, float]:
    """`updates_per_step` optimizer steps, token-weighted. Every rank calls it. Returns metrics by flat names.

    `gap` collects the log-probabilities of the first update only: later ones are of weights that did not sample.

    Raises:
        CaptureError: rollouts that cannot be dealt to the ranks in equal numbers, or an update without a sampled token.
        DiagnosticsError: log-probabilities that are not finite, if there is a correction.
    """
    trainer = config.trainer
    replayed = trainer.policy.fsdp_config.moe_enable_routing_replay
    policy.model.train()
    minis = list(whole.split(-(-len(whole.advantages) // trainer.updates_per_step)))
    if empty := sum(not mini.batch.response_mask.any() for mini in minis):
        raise CaptureError(
            f"rollouts of an update: expected at least one sampled token, got none in {empty} of {len(minis)} updates"
        )
    # The first update's are those that its own forwards give.
    later = _old_logprobs(config, policy, minis[1:]) if trainer.algorithm.correction in OWN_RATIO else None
    totals, norms = _Totals(policy), []
    sampled: list[tuple[Rows, Tensor]] = []  # by the weights that sampled the rollouts
    for mini in minis:
        loss_of = PolicyLoss(trainer.algorithm, mini, samples=len(whole.advantages), group=policy.mesh.sequence_group)
        # The tokens of all ranks, divided by the ranks over which gradients are averaged.
        tokens = int(mini.batch.response_mask.sum()) / dist.get_world_size()
        for rows in policy.rows(mini, trainer.micro_train_batch_size):
            logprobs = policy.logprobs(rows, replayed=replayed)
            if gap is not None and not norms:
                sampled.append((replace(rows, routing=None), logprobs.detach()))
            old = next(later) if later is not None and norms else logprobs.detach()
            loss = loss_of(rows, logprobs, old, policy.reference_logprobs(rows))
            (loss.total / tokens).backward()
            totals.add(rows, loss)
        norms.append(clip_grad_norm(policy.model, trainer.policy.optimizer_config.max_grad_norm))
        policy.optimizer.step()
        policy.optimizer.zero_grad(set_to_none=True)
    # The host reads nothing from the device before the last kernel is queued.
    if gap is not None:
        for rows, logprobs in sampled:
            gap.add(rows, {"replayed" if replayed else "live": logprobs})
    (lr,) = {group["lr"] for group in policy.optimizer.param_groups}
    policy.scheduler.step()
    return totals.metrics(int(whole.batch.response_mask.sum())) | {
        "train/lr": lr,
        "train/grad_norm": float(torch.stack(norms).mean()),
        "train/updates": len(norms),
    }


def _old_logprobs(config: R3Config, policy: Policy, minis: Sequence[StepBatch]) -> Iterator[Tensor]:
    """Of the micro-batches of `minis` in turn, under the weights as they are now, computed as training does."""
    replayed = config.trainer.policy.fsdp_config.moe_enable_routing_replay
    with torch.no_grad():
        found = [
            policy.logprobs(rows, replayed=replayed)
            for mini in minis
            for rows in policy.rows(mini, config.trainer.micro_train_batch_size)
        ]
    return iter(found)


class _Totals:
    """Sums over the micro-batches of a step, of this rank."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers = len(policy.replay.spec.layer_ids) if policy.replay else 0
        self._sums: dict[str, Tensor | float] = {}
        self._correction: CorrectionSums | None = None

    def add(self, rows: Rows, loss: MicroLoss) -> None:
        replay = self._policy.replay
        # Live rows of tokens only: `replay.last` counts the rows of padding too.
        last, real = replay.last if replay else None, rows.tokens.sum().double()
        found: dict[str, Tensor | float] = {
            "loss": loss.total.detach(),
            "clipped": loss.clipped,
            "rows_replayed": last.rows_replayed if last else 0,
            "rows_live": real - (last.rows_replayed if last else 0),
            "pairs_live": real * self._layers - (last.pairs_replayed if last else 0),
        }
        if loss.kl is not None:
            found["kl"] = loss.kl
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
        if loss.correction is not None:
            self._correction = loss.correction if self._correction is None else self._correction + loss.correction

    def metrics(self, tokens: int) -> dict[str, float]:
        """Of all ranks, each of which calls this; `tokens` is the number of sampled tokens."""
        device = self._policy.device
        summed = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in self._sums.values()])
        dist.all_reduce(summed)
        totals = dict(zip(self._sums, summed.tolist(), strict=True))
        found = {
            "train/loss": totals["loss"] / tokens,
            "train/clipped_frac": totals["clipped"] / tokens,
            "routing/rows_replayed": totals["rows_replayed"],
            "routing/rows_live": totals["rows_live"],
            "routing/pairs_live": totals["pairs_live"],
        }
        if "kl" in totals:
            found["train/kl"] = totals["kl"] / tokens
        if self._correction is not None:
            found |= {f"correction/{name}": value for name, value in self._correction.reduce().metrics().items()}
        return found
