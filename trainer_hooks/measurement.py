"""How far the trainer is from the rollouts of a step, before the update: live and replayed on the same tokens.

Shapes: B rollouts of the step, R rows and N positions of a rank's slice, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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
    MergeableSums,
    RoutingSums,
    SequenceSums,
    TokenDetails,
    rank_load_metrics,
    sequence_totals,
)
from r3.routing import RolloutRouting
from r3.routing.validity import by_pair
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.policy_protocol import Scorer
from trainer_hooks.sampling_sets import set_metrics


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Attributes:
    metrics: flat names, the same on every rank.
    details: a line of `details.jsonl`, the same on every rank; None if none was asked for.
    """

    metrics: dict[str, float]
    details: dict[str, Any] | None = None


@torch.no_grad()
def measure(
    policy: Scorer,
    whole: StepBatch,
    *,
    size: int,
    extreme_ratio: float,
    details: bool,
    expert_parallel_size: int = 1,
) -> Measured:
    """Two forwards of all rollouts, one with live and one with replayed routing, or one where there is no routing.

    Where tokens were sampled from a part of the vocabulary, one more gives log-probabilities over all of it. Every
    rank calls it.

    Args:
        policy: is left in evaluation mode.
        whole: the rollouts of the step, the same on every rank.
        size: rollouts in one forward.
        extreme_ratio: bound of `extreme_frac`.
        details: whether to choose single tokens for the report.
        expert_parallel_size: ranks that share the experts; above 1, their load is measured.
    """
    policy.model.eval()
    found = StepGap(
        samples=len(whole.advantages),
        extreme_ratio=extreme_ratio,
        details=details,
        expert_parallel_size=expert_parallel_size,
    )
    for rows in policy.rows(whole, size):
        if rows.routing is None:
            live = policy.logprobs(rows, replayed=False)
            found.add(rows, {"live": live})
            found.add_mass(policy, rows, live)
            continue
        with r3.record(policy.model, margins=True) as recorder:
            live = policy.logprobs(rows, replayed=False)
        replayed = policy.logprobs(rows, replayed=True)
        parted = found.add_routing(recorder.expert_ids, recorder.margins, rows.routing)
        found.add(rows, {"live": live, "replayed": replayed}, parted)
        found.add_mass(policy, rows, replayed)
    found = found.reduced()
    record = found.record(policy.tokenizer.decode, whole.batch) if details else None
    return Measured(metrics=found.metrics(), details=record)


def coverage(rollouts: Rollouts, batch: RolloutBatch, *, trainer_version: int) -> dict[str, float]:
    """How much of the rollouts' routing was captured, and how many versions old it is: flat names.

    Args:
        rollouts: of a step.
        batch: the same, as tensors.
        trainer_version: of the weights that are about to be trained.
    """
    told = [rollout.row_versions for rollout in rollouts if rollout.row_versions is not None]
    versions = pad_sequence(told, batch_first=True, padding_value=-1) if len(told) == len(rollouts) else None
    valid = None if batch.routing is None else batch.routing.validity
    sums = CoverageSums.from_tensors(valid, batch.attention_mask.bool(), versions, trainer_version)
    return {f"routing/{name}": value for name, value in sums.metrics().items()}


def truncation(batch: RolloutBatch) -> dict[str, float]:
    """What top_k, top_p and min_p left to sample from: flat names; none where they are not set."""
    if batch.sampling_mask is None:
        return {}
    return set_metrics(batch.sampling_mask.sizes[batch.response_mask])


@dataclass(kw_only=True)
class StepGap:
    """What the micro-batches of this rank have given so far.

    Args:
        samples: rollouts of the step.
        extreme_ratio: bound of `extreme_frac`.
        details: whether to choose single tokens.
        expert_parallel_size: ranks that share the experts.
    """

    samples: int
    extreme_ratio: float
    details: bool = False
    expert_parallel_size: int = 1
    gaps: dict[str, LogprobSums] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)  # [2, B]: sum of d, and tokens
    routing: tuple[MergeableSums, ...] = ()
    tokens: TokenDetails = field(default_factory=TokenDetails.empty)
    mass: tuple[Tensor, Tensor] | None = None  # that sets have of the vocabulary's: [sum, tokens], and the least
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
        theirs, valid = rollout.expert_ids, rollout.validity
        sums: tuple[MergeableSums, ...] = (
            RoutingSums.from_tensors(mine, theirs, valid, layer_ids=layers),
            LoadSums.from_tensors(mine, theirs, valid, num_experts=experts, layer_ids=layers),
            MarginSums.from_tensors(margins, mine, theirs, valid),
        )
        self.layer_ids = layers
        self.routing = tuple(a + b for a, b in zip(self.routing, sums, strict=True)) if self.routing else sums
        return (mine.sort(-1).values != theirs.sort(-1).values).any(-1) & by_pair(valid)

    def add_mass(self, policy: Scorer, rows: Rows, logprobs: Tensor) -> None:
        """How much of the trainer's own distribution the sets of `rows` hold; `logprobs` `[R, N]` are over the sets."""
        if rows.sampling_mask is None:
            return
        # Of any token of a set: its probability over the vocabulary is that over the set, times the set's.
        whole = policy.logprobs(replace(rows, sampling_mask=None), replayed=rows.routing is not None)
        masses = (whole.double() - logprobs.double()).exp()
        total = torch.stack([(masses * rows.mask).sum(), rows.mask.sum().double()])
        least = masses.masked_fill(~rows.mask, 1.0).amin()
        before = self.mass
        self.mass = (total, least) if before is None else (before[0] + total, torch.minimum(before[1], least))

    def reduced(self) -> StepGap:
        """Of all ranks, each of which calls this."""
        sequences = {side: totals.clone() for side, totals in self.sequences.items()}
        for totals in sequences.values():
            dist.all_reduce(totals)
        mass = self.mass and (self.mass[0].clone(), self.mass[1].clone())
        if mass is not None:
            dist.all_reduce(mass[0])
            dist.all_reduce(mass[1], dist.ReduceOp.MIN)
        return replace(
            self,
            mass=mass,
            gaps={side: gap.reduce() for side, gap in self.gaps.items()},
            sequences=sequences,
            routing=tuple(sums.reduce() for sums in self.routing),
            tokens=self.tokens.gather() if self.details else self.tokens,
        )

    def metrics(self) -> dict[str, float]:
        """Flat names, as `metrics.jsonl` has them."""
        found: dict[str, float] = {}
        for side, gap in self.gaps.items():
            sequences = SequenceSums.from_totals(*self.sequences[side])
            found |= {f"logprob_diff/{side}/{name}": v for name, v in (gap.metrics() | sequences.metrics()).items()}
        for sums in self.routing:
            measured = sums.metrics()
            if isinstance(sums, LoadSums) and self.expert_parallel_size > 1:
                measured |= rank_load_metrics(sums, self.expert_parallel_size)
            found |= {f"routing/{name}": value for name, value in measured.items()}
        if self.mass is not None:
            (total, tokens), least = self.mass
            found |= {"rollout/set_mass_mean": float(total / tokens), "rollout/set_mass_min": float(least)}
        return found

    def record(self, decode: Callable[[list[int]], str], batch: RolloutBatch) -> dict[str, Any]:
        """A line of `details.jsonl`. `batch` has the tokens of all samples."""
        ids, real = batch.input_ids, batch.attention_mask.bool()
        found = self.tokens.record(decode, lambda b: ids[b][real[b]].tolist(), self.layer_ids)
        found["histogram"] = {side: gap.histogram() for side, gap in self.gaps.items()}
        for sums in self.routing:
            if isinstance(sums, LoadSums):
                found["load"] = sums.table()
        return found
