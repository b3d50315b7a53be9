"""How far the trainer is from the rollouts of a step, before the update: live and replayed on the same tokens.

Shapes: B rollouts of the step, R rows and N positions of a rank's slice, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import r3
from r3.capture import RolloutBatch, Rollouts
from r3.diagnostics import (
    CoverageSums,
    LoadSums,
    LogprobSums,
    MarginSums,
    RoutingSums,
    SequenceSums,
    TokenDetails,
    sequence_totals,
)
from r3.routing import RolloutRouting
from trainer_hooks.batches import Rows, StepBatch

if TYPE_CHECKING:
    from trainer_hooks.fsdp import Policy


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Attributes:
    metrics: flat names, the same on every rank.
    details: a line of `details.jsonl`, the same on every rank; None if none was asked for.
    """

    metrics: dict[str, float]
    details: dict[str, Any] | None = None


@torch.no_grad()
def measure(policy: Policy, whole: StepBatch, *, size: int, extreme_ratio: float, details: bool) -> Measured:
    """Two forwards of all rollouts, one with live and one with replayed routing, or one where there is no routing.

    Every rank calls it.

    Args:
        policy: is left in evaluation mode.
        whole: the rollouts of the step, the same on every rank.
        size: rollouts in one forward.
        extreme_ratio: bound of `extreme_frac`.
        details: whether to choose single tokens for the report.
    """
    policy.model.eval()
    found = _Found(samples=len(whole.advantages), extreme_ratio=extreme_ratio, details=details)
    for rows in policy.rows(whole, size):
        if rows.routing is None:
            found.add(rows, {"live": policy.logprobs(rows, replayed=False)})
            continue
        with r3.record(policy.model, margins=True) as recorder:
            live = policy.logprobs(rows, replayed=False)
        replayed = policy.logprobs(rows, replayed=True)
        parted = found.add_routing(recorder.expert_ids, recorder.margins, rows.routing)
        found.add(rows, {"live": live, "replayed": replayed}, parted)
    return found.measured(policy, whole)


def coverage(rollouts: Rollouts, batch: RolloutBatch, *, trainer_version: int) -> dict[str, float]:
    """How much of the rollouts' routing was captured, and how many versions old it is: flat names.

    Args:
        rollouts: of a step.
        batch: the same, as tensors.
        trainer_version: of the weights that are about to be trained.
    """
    told = [rollout.row_versions for rollout in rollouts if rollout.row_versions is not None]
    versions = pad_sequence(told, batch_first=True, padding_value=-1) if len(told) == len(rollouts) else None
    valid = None if batch.routing is None else batch.routing.valid
    sums = CoverageSums.from_tensors(valid, batch.attention_mask.bool(), versions, trainer_version)
    return {f"routing/{name}": value for name, value in sums.metrics().items()}


@dataclass(kw_only=True)
class _Found:
    """What the micro-batches of this rank have given so far."""

    samples: int
    extreme_ratio: float
    details: bool
    gaps: dict[str, LogprobSums] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)  # [2, B]: sum of d, and tokens
    routing: tuple[RoutingSums, LoadSums, MarginSums] | None = None
    tokens: TokenDetails = field(default_factory=TokenDetails.empty)
    layer_ids: tuple[int, ...] | None = None

    def add(self, rows: Rows, sides: dict[str, Tensor], parted: Tensor | None = None) -> None:
        for side, logprobs in sides.items():
            gap = LogprobSums.from_tensors(logprobs, rows.logprobs, rows.mask, extreme_ratio=self.extreme_ratio)
            self.gaps[side] = self.gaps[side] + gap if side in self.gaps else gap
            diff = logprobs.double() - rows.logprobs.double()
            totals = torch.stack(sequence_totals(diff, rows.mask, rows.sample_ids, self.samples))
            self.sequences[side] = self.sequences.get(side, 0) + totals
        if self.details:
            self.tokens += TokenDetails.from_tensors(
                rows.logprobs,
                rows.mask,
                live=sides["live"],
                replayed=sides.get("replayed"),
                token_ids=rows.labels,
                sample_ids=rows.sample_ids,
                positions=rows.position_ids + 1,
                parted=parted,
            )

    def add_routing(self, mine: Tensor, margins: Tensor, rollout: RolloutRouting) -> Tensor:
        """Compare two routings where they are. Returns bool `[R, N, L]`, where they chose different experts."""
        layers, experts = rollout.layer_ids, rollout.num_experts
        theirs, valid = rollout.expert_ids, rollout.valid
        sums = (
            RoutingSums.from_tensors(mine, theirs, valid, layer_ids=layers),
            LoadSums.from_tensors(mine, theirs, valid, num_experts=experts, layer_ids=layers),
            MarginSums.from_tensors(margins, mine, theirs, valid),
        )
        before, self.layer_ids = self.routing, layers
        self.routing = sums if before is None else (before[0] + sums[0], before[1] + sums[1], before[2] + sums[2])
        return (mine.sort(-1).values != theirs.sort(-1).values).any(-1) & valid[..., None]

    def measured(self, policy: Policy, whole: StepBatch) -> Measured:
        """Of all ranks."""
        gaps = {side: gap.reduce() for side, gap in self.gaps.items()}
        routing = [] if self.routing is None else [sums.reduce() for sums in self.routing]
        metrics: dict[str, float] = {}
        for side, gap in gaps.items():
            totals = self.sequences[side]
            dist.all_reduce(totals)
            sequences = SequenceSums.from_totals(totals[0], totals[1])
            metrics |= {f"logprob_diff/{side}/{k}": v for k, v in (gap.metrics() | sequences.metrics()).items()}
        for sums in routing:
            metrics |= {f"routing/{name}": value for name, value in sums.metrics().items()}
        if not self.details:
            return Measured(metrics=metrics)
        ids, real = whole.batch.input_ids, whole.batch.attention_mask.bool()
        tokens = self.tokens.gather()
        record = tokens.record(policy.tokenizer.decode, lambda b: ids[b][real[b]].tolist(), self.layer_ids)
        record["histogram"] = {side: gap.histogram() for side, gap in gaps.items()}
        for sums in routing:
            if isinstance(sums, LoadSums):
                record["load"] = sums.table()
        return Measured(metrics=metrics, details=record)
