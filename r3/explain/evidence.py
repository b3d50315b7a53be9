"""Evidence on the saved tokens: the reported log-probabilities, and those that each forward and distribution gives.

N sampled tokens, D distributions. d = scored - reported, nats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from r3.capture import Rollouts
from r3.errors import DiagnosticsError, summary
from r3.explain.adjustments import FAMILIES, AdjustmentFamily
from r3.explain.distributions import (
    NONE,
    TEMPERATURES,
    Distribution,
    interpolate,
    place_of,
    temperature_at,
)
from r3.explain.scoring import ShiftedView, scored

CLAMPED_NATS = -1000.0
"""vLLM reports -9999 for what has no probability: no measurement."""
EXCLUDED = 0.05
"""Share of the sampled tokens that a truncated distribution may exclude; more than other weights and flips make."""
_LARGEST_D = 30.0
WITHIN_NATS = 3.0
"""Log-likelihood ratio of an estimate's range: it misses the truth once in 70."""
SHIFTS = (0, 1, -1)


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """The sampled tokens of all rollouts, in order.

    Attributes:
        reported: float64 `[N]`, the rollouts' log-probabilities, nats.
        usable: bool `[N]`, False where what was reported is a clamp.
        rollout: int64 `[N]`, index of the rollout.
        position: int64 `[N]`, index among the rollout's tokens.
        version: int64 `[N]`, of the weights that the token was sampled from, -1 where unknown.
    """

    reported: Tensor
    usable: Tensor
    rollout: Tensor
    position: Tensor
    version: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts) -> "ScoredTokens":
        """The scored tokens of `rollouts`.

        Raises:
            DiagnosticsError: a log-probability that is not finite.
        """
        parts: dict[str, list[Tensor]] = {"reported": [], "rollout": [], "position": [], "version": []}
        for number, item in enumerate(rollouts):
            kept = scored(item)
            position = kept.nonzero()[:, 0]
            parts["reported"].append(item.logprobs[kept].double())
            parts["rollout"].append(torch.full_like(position, number))
            parts["position"].append(position)
            if item.row_versions is None:
                only = -1 if item.weight_version is None else item.weight_version
                parts["version"].append(torch.full_like(position, only))
            else:
                parts["version"].append(item.row_versions.long()[position + len(item.prompt_ids) - 1])
        joined = {name: torch.cat(tensors) if tensors else torch.empty(0).long() for name, tensors in parts.items()}
        reported = joined["reported"].double()
        bad = (~reported.isfinite() & ~reported.isneginf()).nonzero()[:, 0].tolist()
        if bad:
            where = [f"rollout {joined['rollout'][i]}, token {joined['position'][i]}: {reported[i]}" for i in bad[:17]]
            raise DiagnosticsError(f"log-probabilities of {len(bad)} tokens are not finite numbers:{summary(where)}")
        return cls(**joined | {"reported": reported}, usable=reported > CLAMPED_NATS)

    def __len__(self) -> int:
        return len(self.reported)

    def shifted(self, shift: int) -> Tensor:
        """float64 `[N]`: the log-probability reported for the token `shift` places later; NaN where there is none."""
        reported = torch.where(self.usable, self.reported, math.nan)
        if not shift:
            return reported
        moved = torch.full_like(reported, math.nan)
        here, there = (
            (slice(None, -shift), slice(shift, None)) if shift > 0 else (slice(-shift, None), slice(None, shift))
        )
        beside = (self.rollout[here] == self.rollout[there]) & (self.position[here] + shift == self.position[there])
        moved[here] = torch.where(beside, reported[there], math.nan)
        return moved


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """An estimate of the temperature of sampling, its range, and its log-likelihood, nats in all."""

    temperature: float
    low: float
    high: float
    nats: float


def k3(d: Tensor) -> Tensor:
    """Mean of exp(d) - 1 - d over the last axis, nats, without NaN; d counts as at most 30."""
    d = d.clamp_max(_LARGEST_D)
    return (torch.expm1(d) - d).nanmean(-1)


def is_smaller(d: Tensor, than: Tensor, errors: float = 3.0) -> bool:
    """Whether |d| is significantly below |than| on their common tokens, in standard errors of the mean difference.

    Compares absolute differences, clipped at ten times their mean: a few tokens make up most of k3, and would dominate
    the standard error.
    """
    most = 10 * float(than.abs().nanmean())
    difference = than.abs().clamp_max(most) - d.abs().clamp_max(most)
    difference = difference[difference.isfinite()]
    if len(difference) < 2:
        return False
    error = difference.std() / math.sqrt(len(difference))
    return bool(difference.mean() > errors * error)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All scores of the tokens.

    Attributes:
        tokens: what was reported.
        distributions: the D of the tables: `expected` without truncation first.
        tables: for each view, float32 `[D, N]`.
        expected: what the trainer scores with.
        exclusions: truncated distributions, those of `masses`.
        masses: for each view, float32 `[D', N]`, as `signed_mass` gives them.
        excluded: for each view, `[D]`, the share of the tokens that a distribution does not keep, where it is known.
    """

    tokens: ScoredTokens
    distributions: Sequence[Distribution]
    tables: Mapping[ShiftedView, Tensor]
    expected: Distribution
    exclusions: Sequence[Distribution]
    masses: Mapping[ShiftedView, Tensor]
    excluded: Mapping[ShiftedView, Tensor] = field(default_factory=dict)

    @cached_property
    def _places(self) -> dict[Distribution, int]:
        return {distribution: place for place, distribution in enumerate(self.distributions)}

    @cached_property
    def _grid(self) -> list[int]:
        return [self._places[Distribution(temperature=t)] for t in TEMPERATURES]

    def _family(self, family: AdjustmentFamily) -> list[int]:
        """Places of a penalty's values, at the expected temperature."""
        plain = Distribution(temperature=self.expected.temperature)
        return [self._places[replace(plain, adjustment=adjustment)] for adjustment in family.grid]

    def scored(self, view: ShiftedView, distribution: Distribution) -> Tensor:
        """float64 `[N]`; a temperature or a penalty between those of the table is interpolated."""
        place = self._places.get(distribution)
        if place is not None:
            return self.tables[view][place].double()
        for family in FAMILIES:
            between = family.place(distribution.adjustment) if distribution.adjustment else None
            if between is not None:
                return interpolate(self.tables[view][self._family(family)].double(), between)
        return interpolate(self.tables[view][self._grid].double(), place_of(distribution.temperature))

    def d(self, view: ShiftedView, shift: int, distribution: Distribution) -> Tensor:
        """float64 `[N]`, NaN where nothing was reported."""
        return self.scored(view, distribution) - self.tokens.shifted(shift)

    def best_temperature(self, view: ShiftedView, shift: int) -> Distribution:
        """The temperature, alone, that minimises k3."""
        reported = self.tokens.shifted(shift)
        table = self.tables[view][self._grid].double()
        return Distribution(temperature=temperature_at(_minimum(table, lambda scores: float(k3(scores - reported)))))

    def best_adjusted(self, view: ShiftedView, shift: int) -> Distribution:
        """The adjustment of the logits that minimises k3: one penalty alone, or that of the settings."""
        reported = self.tokens.shifted(shift)
        plain = Distribution(temperature=self.expected.temperature)
        candidates = [replace(plain, adjustment=self.expected.adjustment)] if self.expected.adjustment else []
        for family in FAMILIES:
            table = self.tables[view][self._family(family)].double()
            place = _minimum(table, lambda scores: float(k3(scores - reported)))
            candidates.append(replace(plain, adjustment=family.at(place)))
        return min(candidates, key=lambda distribution: float(k3(self.scored(view, distribution) - reported)))

    def best_truncated(self, view: ShiftedView, shift: int, *, temperature: float | None = None) -> Distribution | None:
        """The truncated distribution of the table that minimises k3, over all temperatures or at one.

        Ignores distributions that exclude more of the sampled tokens than rounding would.
        """
        excluded = self.excluded.get(view, torch.zeros(len(self.distributions))).tolist()
        reported = self.tokens.shifted(shift)
        gaps = [
            (float(k3(self.tables[view][place].double() - reported)), place)
            for place, distribution in enumerate(self.distributions)
            if distribution.truncated
            and distribution.adjustment == NONE
            and excluded[place] <= EXCLUDED
            and temperature in (None, distribution.temperature)
        ]
        return self.distributions[min(gaps)[1]] if gaps else None

    def likeliest_temperature(self, view: ShiftedView) -> "Likeliest":
        """The temperature that maximises the likelihood of the sampled tokens."""
        likelihood = self.tables[view][self._grid].double().sum(1, keepdim=True)
        place = _minimum(likelihood, lambda total: -float(total))
        temperature, most_nats = temperature_at(place), float(interpolate(likelihood, place))
        steps = [TEMPERATURES[0] * (TEMPERATURES[-1] / TEMPERATURES[0]) ** (i / 400) for i in range(401)]
        near = [t for t in steps if float(interpolate(likelihood, place_of(t))) >= most_nats - WITHIN_NATS]
        return Likeliest(
            temperature=temperature,
            low=min(near, default=temperature),
            high=max(near, default=temperature),
            nats=most_nats,
        )

    def never_sampled(self, view: ShiftedView, temperature: float) -> tuple[Distribution, float] | None:
        """The truncation for which the sampled tokens are the strongest evidence, and the strength of that evidence.

        Sampled from the whole distribution, the number of tokens that a truncated one excludes has the expectation E
        of their mass. To see so few as O is less likely than exp(-(E - O + O log(O / E))), by Chernoff's bound for sums
        of dependent indicators; that exponent is returned.
        """
        best: tuple[Distribution, float] | None = None
        for place, distribution in enumerate(self.exclusions):
            if distribution.temperature != temperature:
                continue
            mass = self.masses[view][place].double()
            expected, seen = float((1 - mass.abs()).sum()), int((mass < 0).sum())
            if seen >= expected:
                continue
            nats = expected - seen + (seen * math.log(seen / expected) if seen else 0.0)
            if best is None or nats > best[1]:
                best = distribution, nats
        return best


def _minimum(table: Tensor, loss: Callable[[Tensor], float]) -> float:
    """The place that minimises `loss` of the scores: the best row, refined by golden-section search."""
    losses = [loss(row) for row in table]
    best = min(range(len(losses)), key=losses.__getitem__)
    low, high = max(best - 1, 0), min(best + 1, len(losses) - 1)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(16):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if loss(interpolate(table, a)) < loss(interpolate(table, b)):
            high = b
        else:
            low = a
    return (low + high) / 2
