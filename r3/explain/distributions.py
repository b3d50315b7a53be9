"""Sampling distributions, from logits to log-probabilities: adjustments, temperature, and truncation by vLLM's top-k,
top-p and min-p.

n tokens, V tokens of vocabulary, D distributions.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from r3.explain.adjustments import FAMILIES, Adjustment, Before

TEMPERATURES = tuple(2 ** (step / 10) for step in range(-20, 21))
"""0.25 to 4, each 7% above the one before: near enough for cubic interpolation of a token's log-probability."""
TRUNCATED_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
TOP_P = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995)
MIN_P = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
TOP_K = (2, 3, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 100, 128, 200, 256, 500, 512, 1000, 1024)

SORTED = 2048
"""Most probable tokens that are sorted; where a nucleus needs more, its mass is taken for what was asked."""
_CHUNK_BYTES = 1 << 26

Key = TypeVar("Key", bound=Hashable)


NONE = Adjustment()


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A sampling distribution as vLLM computes it. Logits are adjusted and divided by the temperature. Then only tokens
    of at least `min_p` times the largest probability are kept, of these the `top_k` most probable (0: all), and of
    these the nucleus of mass `top_p`. The rest is renormalised."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    adjustment: Adjustment = NONE

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def truncation(self) -> str:
        """The truncation in words; empty if there is none."""
        words = [f"min-p {self.min_p:g}"] * (self.min_p > 0)
        words += [f"top-k {self.top_k}"] * (self.top_k > 0)
        words += [f"top-p {self.top_p:g}"] * (self.top_p < 1)
        return " and ".join(words)

    def __str__(self) -> str:
        parts = (f"temperature {self.temperature:.3g}", self.truncation, str(self.adjustment))
        return ", ".join(part for part in parts if part)


def candidates(expected: Distribution, vocabulary: int) -> tuple[Distribution, ...]:
    """All distributions to try: `expected` first, then temperatures alone, then truncated and adjusted ones."""
    plain = Distribution(temperature=expected.temperature)
    distributions = [plain, *(Distribution(temperature=t) for t in TEMPERATURES)]
    for t in sorted({expected.temperature, *TRUNCATED_TEMPERATURES}):
        distributions += [Distribution(temperature=t, top_p=p) for p in TOP_P]
        distributions += [Distribution(temperature=t, top_k=k) for k in TOP_K if k < vocabulary]
        distributions += [Distribution(temperature=t, min_p=p) for p in MIN_P]
        if expected.truncated:
            distributions.append(replace(expected, temperature=t, adjustment=NONE))
    distributions += [replace(plain, adjustment=adjustment) for family in FAMILIES for adjustment in family.grid]
    distributions += [replace(plain, adjustment=expected.adjustment), expected]
    return (
        tuple(dict.fromkeys(distributions[1:]))
        if plain in distributions[1:]
        else (plain, *dict.fromkeys(distributions[1:]))
    )


def exclusions(expected: Distribution, vocabulary: int) -> tuple[Distribution, ...]:
    """Truncated distributions whose excluded tokens are counted: at the expected temperature, and at 1."""
    return tuple(
        d
        for d in candidates(expected, vocabulary)
        if not d.adjustment and d.temperature in (1.0, expected.temperature) and _truncations(d) == 1
    )


def _truncations(d: Distribution) -> int:
    return (d.top_k > 0) + (d.top_p < 1) + (d.min_p > 0)


def score(
    logits: Tensor, labels: Tensor, distributions: Sequence[Distribution], before: Before | None = None
) -> Tensor:
    """Float32 `[D, n]`, log-probability in nats of each label under each distribution.

    A token that a distribution excludes is scored as if it were among the kept: rounding moves tokens over a boundary,
    and a distribution that does not fit shows in the mass that it keeps, at every token.

    Args:
        logits: float `[n, V]`.
        labels: int64 `[n]`.
        before: the tokens before each label; needed if a distribution has an adjustment.
    """
    return score_and_admit(logits, labels, distributions, before)[0]


def score_and_admit(
    logits: Tensor, labels: Tensor, distributions: Sequence[Distribution], before: Before | None = None
) -> tuple[Tensor, Tensor]:
    """The result of `score`, and bool `[D, n]`, whether a distribution keeps the label."""
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[1]))
    parts = [
        _adjusted(logits[at : at + step].float(), labels[at : at + step], distributions, before, slice(at, at + step))
        for at in range(0, len(labels), step)
    ]
    if not parts:
        nothing = torch.empty(len(distributions), 0, device=logits.device)
        return nothing, nothing.bool()
    return torch.cat([scores for scores, _ in parts], dim=1), torch.cat([inside for _, inside in parts], dim=1)


def _adjusted(
    logits: Tensor, labels: Tensor, distributions: Sequence[Distribution], before: Before | None, tokens: slice
) -> tuple[Tensor, Tensor]:
    """As `_score`, with the logits of each adjustment."""
    logprobs = logits.new_empty(len(distributions), len(labels))
    inside = torch.ones_like(logprobs, dtype=torch.bool)
    compact: dict[float, tuple[Tensor, Tensor, Tensor]] = {}
    for adjustment, places in _by(distributions, lambda d: d.adjustment).items():
        chosen = [distributions[place] for place in places]
        if not adjustment:
            logprobs[places], inside[places] = _score(logits, labels, chosen)
            continue
        assert before is not None
        here, temperature = before.part(tokens), chosen[0].temperature
        if adjustment.of_seen and not any(d.truncated or d.temperature != temperature for d in chosen):
            if temperature not in compact:
                compact[temperature] = here.compact(logits, labels, temperature)
            columns, *counts = compact[temperature]
            logprobs[places] = _score(adjustment.applied(columns, labels * 0, *counts), labels * 0, chosen)[0]
        else:
            changed = adjustment.applied(logits, labels, *here.counts(logits.shape[1]))
            logprobs[places], inside[places] = _score(changed, labels, chosen)
    return logprobs, inside


def _score(logits: Tensor, labels: Tensor, distributions: Sequence[Distribution]) -> tuple[Tensor, Tensor]:
    own = logits.gather(1, labels[:, None])
    ordered = _Ordered.of(logits, own) if any(d.truncated for d in distributions) else None
    logprobs = logits.new_empty(len(distributions), len(labels))
    inside = torch.ones_like(logprobs, dtype=torch.bool)
    for temperature, places in _by(distributions, lambda d: d.temperature).items():
        total = (logits / temperature).logsumexp(1, keepdim=True)
        plain = (own / temperature - total)[:, 0]
        cumulative = ordered.cumulative(temperature, total) if ordered is not None else None
        for place in places:
            distribution = distributions[place]
            logprobs[place] = plain
            if distribution.truncated:
                assert cumulative is not None
                kept, inside[place] = cumulative.kept(distribution)
                logprobs[place] = plain - kept.log()
    return logprobs, inside


def signed_mass(logits: Tensor, labels: Tensor, distributions: Sequence[Distribution]) -> Tensor:
    """Float32 `[D, n]`: the mass that each truncated distribution keeps, negative where it excludes the label.

    Exact at the boundary, so that under sampling from the whole distribution the label is excluded with a probability
    of one less the mass.
    """
    logits = logits.float()
    ordered = _Ordered.of(logits, logits.gather(1, labels[:, None]))
    masses = logits.new_empty(len(distributions), len(labels))
    for temperature, places in _by(distributions, lambda d: d.temperature).items():
        cumulative = ordered.cumulative(temperature, (logits / temperature).logsumexp(1, keepdim=True))
        for place in places:
            kept, inside = cumulative.kept(distributions[place])
            masses[place] = torch.where(inside, kept, -kept)
    return masses


def _by(distributions: Sequence[Distribution], key: Callable[[Distribution], Key]) -> dict[Key, list[int]]:
    places: dict[Key, list[int]] = {}
    for place, distribution in enumerate(distributions):
        places.setdefault(key(distribution), []).append(place)
    return places


@dataclass(frozen=True)
class _Ordered:
    """The largest logits `[n, R]`, descending, and the labels' ranks `[n]`, from 0: the same at all temperatures."""

    logits: Tensor
    rank: Tensor

    @classmethod
    def of(cls, logits: Tensor, own: Tensor) -> "_Ordered":
        return cls(logits.topk(min(SORTED, logits.shape[1])).values, (logits > own).sum(1))

    def cumulative(self, temperature: float, total: Tensor) -> "_Cumulative":
        """Args: `total` is the logarithm of the sum of all exponentials, `[n, 1]`."""
        mass = (self.logits / temperature - total).exp().cumsum(1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1)
        return _Cumulative(mass, before, (self.logits[:, :1] - self.logits) / temperature, self.rank)


@dataclass(frozen=True)
class _Cumulative:
    """Mass of the r + 1 most probable tokens, and of the r before them, `[n, R]`; nats by which the last of them is
    below the first; the labels' ranks `[n]`."""

    mass: Tensor
    before: Tensor
    below: Tensor
    rank: Tensor

    def kept(self, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """The mass that is kept `[n]`, and whether the label is among it."""
        k, p, sorted_tokens = distribution.top_k, distribution.top_p, self.mass.shape[1]
        # The most that are kept of each row, and whether the label is among them.
        most = torch.full_like(self.rank, sorted_tokens)
        if distribution.min_p:
            most = (self.below <= -math.log(distribution.min_p)).sum(1)
        if k:
            most = most.clamp_max(k)
        limited = most < sorted_tokens
        base = torch.where(limited, self.mass.gather(1, most[:, None] - 1)[:, 0], 1.0)
        kept, inside = base, torch.where(limited, self.rank < most, True)
        if p < 1:
            tokens = torch.searchsorted(self.before, p * base[:, None])[:, 0]
            tokens = tokens.clamp_min(1).minimum(most)
            kept = self.mass.gather(1, tokens[:, None] - 1)[:, 0].clamp_max(1.0)
            kept = torch.where(tokens == sorted_tokens, kept.clamp_min(p), kept)
            ahead = self.before.gather(1, self.rank.clamp_max(sorted_tokens - 1)[:, None])[:, 0]
            inside = inside & (ahead < p * base)
        return kept, inside


def temperature_at(place: float) -> float:
    """The temperature at a place in `TEMPERATURES`, interpolated between two."""
    return TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** place


def place_of(temperature: float) -> float:
    """The inverse of `temperature_at`."""
    return math.log(temperature / TEMPERATURES[0]) / math.log(TEMPERATURES[1] / TEMPERATURES[0])


def interpolate(table: Tensor, at: float) -> Tensor:
    """`[n]` at a place between the rows of `[T, n]`, of evenly spaced parameters, by the four nearest."""
    first = min(max(math.floor(at) - 1, 0), len(table) - 4)
    x = at - first
    weights = [math.prod((x - other) / (node - other) for other in range(4) if other != node) for node in range(4)]
    return sum((w * table[first + node] for node, w in enumerate(weights)), torch.zeros_like(table[0]))
