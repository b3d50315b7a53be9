"""Hypotheses: alternative scorings of the same tokens, each with the causes that it assumes.

Every hypothesis leaves a gap. A cause holds if the best hypothesis without it leaves a much larger gap than the best
with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from r3.explain.distributions import Distribution
from r3.explain.evidence import SHIFTS, Evidence, is_smaller, k3
from r3.explain.scoring import ShiftedView

ROUTING, ROWS, LOGPROBS, WEIGHTS, TEMPERATURE, TRUNCATION, ADJUSTMENT = (
    "routing",
    "shifted_rows",
    "shifted_logprobs",
    "stale_sync",
    "temperature",
    "renormalised",
    "adjusted",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """One way in which the reported log-probabilities may have been computed.

    Attributes:
        view: weights and routing.
        shift: each token has the log-probability of the token `shift` places later.
        distribution: the distribution of the reported log-probabilities.
        causes: assumptions beyond live routing, the model's weights and the expected distribution.
        d: float64 `[N]`, scored - reported, nats; NaN where the shift leaves a token without a value.
    """

    view: ShiftedView
    shift: int
    distribution: Distribution
    causes: frozenset[str]
    d: Tensor

    @cached_property
    def k3(self) -> float:
        """The gap that is left, nats a token."""
        return float(k3(self.d))

    @cached_property
    def abs_mean(self) -> float:
        return float(self.d.abs().nanmean())


def hypotheses(evidence: Evidence) -> Iterator[Hypothesis]:
    """All hypotheses: each view, shift and kind of distribution, with the best-fitting distribution of its kind."""
    expected = evidence.expected
    for view, shift in product(evidence.tables, SHIFTS):
        fitted: list[tuple[Distribution | None, set[str]]] = [
            (Distribution(temperature=expected.temperature), set()),
            (evidence.best_temperature(view, shift), {TEMPERATURE}),
            (evidence.best_truncated(view, shift, temperature=expected.temperature), {TRUNCATION}),
            (evidence.best_truncated(view, shift), {TRUNCATION, TEMPERATURE}),
            (evidence.best_adjusted(view, shift), {ADJUSTMENT}),
        ]
        if expected.adjustment and expected.truncated:
            fitted.append((expected, {ADJUSTMENT, TRUNCATION}))
        causes = {
            name
            for name, supposed in (
                (WEIGHTS, view.weights),
                (ROUTING, view.replayed),
                (ROWS, view.rows),
                (LOGPROBS, shift),
            )
            if supposed
        }
        for distribution, more in fitted:
            if distribution is None or (more == {TRUNCATION, TEMPERATURE} and distribution == fitted[2][0]):
                continue
            yield Hypothesis(
                view=view,
                shift=shift,
                distribution=distribution,
                causes=frozenset(causes | more),
                d=evidence.d(view, shift, distribution),
            )


def best(hypotheses: Iterable[Hypothesis], allowed: frozenset[str]) -> Hypothesis:
    """The hypothesis with the smallest gap that assumes only `allowed` causes; of equal ones the simplest."""
    fitting = [hypothesis for hypothesis in hypotheses if hypothesis.causes <= allowed]
    return min(fitting, key=lambda hypothesis: (hypothesis.k3, len(hypothesis.causes)))


@dataclass(frozen=True, kw_only=True)
class Needed:
    """A cause that holds.

    Attributes:
        name: of the cause.
        without: the best hypothesis without it.
        significant: whether the difference is significant over all tokens.
    """

    name: str
    without: Hypothesis
    significant: bool


def needed_causes(hypotheses: list[Hypothesis], *, floor: float, factor: float) -> tuple[Hypothesis, list[Needed]]:
    """Prune the causes of the best hypothesis greedily, least important first, as long as the gap stays small.

    A cause stays if without it the gap is more than `factor` times the best one's, and of the floor. It is significant
    if the difference is more than three standard errors.

    Args:
        hypotheses: all hypotheses.
        floor: k3 below which differences mean nothing, nats.
        factor: see above.

    Returns:
        The best hypothesis with only the causes that stay, and these, the most needed first.
    """
    kept = best(hypotheses, frozenset(name for h in hypotheses for name in h.causes))
    limit = factor * max(kept.k3, floor)
    while True:
        rivals = [(best(hypotheses, kept.causes - {name}), name) for name in sorted(kept.causes)]
        rivals.sort(key=lambda rival: (rival[0].k3, len(rival[0].causes)))
        if not rivals:
            return kept, []
        easiest = rivals[0][0]
        if easiest.k3 > limit:
            return kept, [
                Needed(name=name, without=without, significant=is_smaller(kept.d, without.d))
                for without, name in reversed(rivals)
            ]
        kept = easiest


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of the probabilities of two log-probabilities `[N]`, where both are known."""
    both = a.isfinite() & b.isfinite()
    if both.sum() < 2:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a[both].exp(), b[both].exp()]))[0, 1])
