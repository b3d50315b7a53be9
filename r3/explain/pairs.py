"""Compares two files of rollouts: the same tokens scored or routed twice, or different tokens."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from r3.capture import Rollout, Rollouts, SamplingSettings, load_rollouts, saved_settings
from r3.diagnostics import LogprobSums, RoutingSums
from r3.routing.validity import in_one_form


@dataclass(frozen=True, kw_only=True)
class Side:
    """Summary of one file.

    Attributes:
        rollouts, tokens: numbers of them; tokens are sampled ones.
        length_mean: sampled tokens a rollout.
        logprob_mean: of the sampled tokens, nats.
        coverage: rows of routing that are valid in every layer, over rows that a rollout has (all tokens but the last);
            NaN without routing.
        versions: of the weights, ascending.
        failed: responses that could not be used.
        settings: under which it was sampled.
    """

    rollouts: int
    tokens: int
    length_mean: float
    logprob_mean: float
    coverage: float
    versions: tuple[int, ...]
    failed: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, rollouts: Rollouts, settings: SamplingSettings) -> "Side":
        tokens = sum(int(item.response_mask.sum()) for item in rollouts)
        total = math.fsum(float(item.logprobs[item.response_mask].double().sum()) for item in rollouts)
        routed = [item.routing for item in rollouts if item.routing is not None]
        rows = sum(max(routing.shape[1] - 1, 0) for routing in routed)
        return cls(
            rollouts=len(rollouts),
            tokens=tokens,
            length_mean=tokens / len(rollouts) if len(rollouts) else math.nan,
            logprob_mean=total / tokens if tokens else math.nan,
            coverage=sum(routing.rows_valid for routing in routed) / rows if rows else math.nan,
            versions=tuple(sorted({version for item in rollouts for version in item.weight_versions})),
            failed=len(rollouts.failed),
            settings=settings.to_dict(),
        )


@dataclass(frozen=True, kw_only=True)
class PairComparison:
    """How two files differ.

    Attributes:
        a, b: each by itself.
        same_tokens: rollouts whose prompt and sampled tokens are the same in both.
        logprobs: `LogprobSums.metrics()` of these, first less second (`k3`: of the second to the first); empty without.
        routing: `RoutingSums.metrics()` of these where both have valid rows; empty without.
        notes: parts that could not be compared.
    """

    a: Side
    b: Side
    same_tokens: int
    logprobs: dict[str, float]
    routing: dict[str, float]
    notes: tuple[str, ...]

    @property
    def wrong(self) -> bool:
        """Always False: two files may differ, and it is not known which is right."""
        return False

    @property
    def verdict(self) -> str:
        """One sentence."""
        of = max(self.a.rollouts, self.b.rollouts)
        if not self.same_tokens:
            return "other tokens: no rollout of one file is in the other; only averages can be compared"
        if self.same_tokens < of:
            return f"the same tokens in {self.same_tokens} of {of} rollouts; the others are compared by averages only"
        return f"the same tokens in all {of} rollouts"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {"wrong": self.wrong, "verdict": self.verdict, **asdict(self)}


def compare_files(a: Path, b: Path) -> PairComparison:
    """Compare two files that `save_rollouts` wrote. Rollouts are matched by their tokens, in any order.

    Raises:
        CaptureError: one is no such file.
    """
    first, second = load_rollouts(a), load_rollouts(b)
    by_tokens: dict[tuple, list[Rollout]] = {}
    for item in second:
        by_tokens.setdefault(_key(item), []).append(item)
    pairs = [(item, by_tokens[_key(item)].pop(0)) for item in first if by_tokens.get(_key(item))]
    notes: list[str] = []
    return PairComparison(
        a=Side.of(first, saved_settings(a)),
        b=Side.of(second, saved_settings(b)),
        same_tokens=len(pairs),
        logprobs=_logprobs(pairs, notes),
        routing=_routing(pairs, first, second, notes),
        notes=tuple(notes),
    )


def _key(item: Rollout) -> tuple:
    return tuple(item.prompt_ids), tuple(item.token_ids)


def _logprobs(pairs: list[tuple[Rollout, Rollout]], notes: list[str]) -> dict[str, float]:
    if not pairs:
        return {}
    first, second, mask = (
        torch.cat(parts)
        for parts in zip(*((a.logprobs, b.logprobs, a.response_mask & b.response_mask) for a, b in pairs), strict=True)
    )
    finite = first.isfinite() & second.isfinite()
    if (mask & ~finite).any():
        notes.append(f"{int((mask & ~finite).sum())} tokens have a log-probability that is not finite: left out")
    return LogprobSums.from_tensors(first, second, mask & finite).metrics()


def _routing(
    pairs: list[tuple[Rollout, Rollout]], first: Rollouts, second: Rollouts, notes: list[str]
) -> dict[str, float]:
    if first.spec is None or second.spec is None:
        if first.spec is not second.spec:
            notes.append("only one of the files has routing")
        return {}
    if first.spec != second.spec:
        notes.append(f"routing cannot be compared: {first.spec} in one, {second.spec} in the other")
        return {}
    sums = []
    for one, other in ((a.routing, b.routing) for a, b in pairs):
        if one is not None and other is not None:
            valid = torch.stack(in_one_form([one.validity, other.validity])).all(0)
            sums.append(RoutingSums.from_tensors(one.expert_ids, other.expert_ids, valid, layer_ids=one.layer_ids))
    return sum(sums[1:], sums[0]).metrics() if sums else {}
