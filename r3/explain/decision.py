"""The decision rule: from hypotheses and their gaps to causes. docs/reference/explain.md gives it in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from r3.capture import SamplingSettings
from r3.capture.settings import RAW
from r3.diagnostics import RoutingSums
from r3.explain import messages as words
from r3.explain.distributions import Distribution
from r3.explain.evidence import Evidence, is_smaller, k3
from r3.explain.hypotheses import (
    ADJUSTMENT,
    LOGPROBS,
    ROUTING,
    ROWS,
    TEMPERATURE,
    TRUNCATION,
    WEIGHTS,
    Hypothesis,
    Needed,
    correlation,
    hypotheses,
    needed_causes,
)
from r3.explain.outcome import Cause, Explanation, Tried
from r3.explain.scoring import ShiftedView

MIN_TOKENS = 200
"""Fewer name no cause: their k3 is chance."""
PRECISION = 8.0
"""Times the model's own bfloat16-to-float32 k3, up to which a gap is one of precision. Two sides that round
independently are at 2; other kernels, orders of sums and a router in another precision add to it."""
FACTOR, FACTOR_UNEXPLAINED = 2.0, 5.0
"""A cause holds if the gap without it is so many times the gap with it: if what remains is precision, and if not."""
OTHER_WEIGHTS_NATS = 0.02
"""k3 from which what no hypothesis explains is put down to the weights. bfloat16 gaps are 1e-6 to 1e-3, of 8-bit
weights up to 1e-2; two unrelated models are nats apart."""
SAME_ROUTERS = 0.2
"""Share of (token, layer) pairs with other experts up to which the routers saw the same weights. Rounding makes a few
hundredths, the noise of the tests an eighth; weights of which half choose otherwise are only 0.003 nats apart."""
LIKELIER_NATS, EXCLUDED_NATS = 8.0, 12.0
"""Log-likelihood ratio from which tokens were sampled at another temperature (by chance once in 10^4), and the exponent
of the chance from which some tokens were excluded (more are tried)."""
NOTICED = 0.05
"""Relative difference of temperatures below which they are the same."""
FLOOR_NATS = 1e-9
"""Rounding of the float32 in which log-probabilities are reported."""


@dataclass(frozen=True, kw_only=True)
class DecisionInputs:
    """What the decision is based on.

    Attributes:
        evidence: scores of the tokens.
        precision: view -> float32 `[D, N]`, difference between the same model's scores in the two precisions.
        routing: agreement of live routing with the saved rows, by shift of the rows.
        settings: settings of sampling in the file.
        names: paths of the checkpoints: the model, then the earlier ones.
        rollouts: number of them.
    """

    evidence: Evidence
    precision: Mapping[ShiftedView, Tensor]
    routing: Mapping[int, RoutingSums]
    settings: SamplingSettings
    names: Sequence[str]
    rollouts: int


class _Decision:
    """The steps of the decision, with their shared state."""

    def __init__(self, inputs: DecisionInputs) -> None:
        self.inputs = inputs
        self.evidence = inputs.evidence
        self.hypotheses = list(hypotheses(inputs.evidence))
        self.replayed = any(view.replayed for view in inputs.evidence.tables)
        plain = Distribution(temperature=inputs.evidence.expected.temperature)
        fits = min(self.hypotheses, key=lambda h: h.k3).distribution
        self.floor = max(FLOOR_NATS, self._floor(plain), self._floor(fits))
        self.live = self._as_trainer(ShiftedView())
        self.causes: list[Cause] = []
        self.notes: list[str] = []

    def _floor(self, distribution: Distribution) -> float:
        """k3 between the model's two precisions under the nearest distribution of the table.

        Under a truncated one it is larger: rounding moves tokens over the boundary, and the mass that is kept jumps.
        """
        choices = [d for d in self.evidence.distributions if d.truncated == distribution.truncated]
        nearest = min(
            choices, key=lambda d: (d != distribution, abs(math.log(d.temperature / distribution.temperature)))
        )
        place = self.evidence.distributions.index(nearest)
        # The smaller of live and replayed: live includes routing flips, and replayed would include wrong rows.
        return min(float(k3(d[place].double())) for d in self.inputs.precision.values())

    def _as_trainer(self, view: ShiftedView) -> Hypothesis:
        return next(h for h in self.hypotheses if h.view == view and not h.shift and not h.causes - {ROUTING, ROWS})

    @property
    def precise(self) -> float:
        """The largest k3 that precision explains."""
        return PRECISION * self.floor

    def run(self) -> Explanation:
        evidence, tokens = self.evidence, int(self.evidence.tokens.usable.sum())
        clamped = len(evidence.tokens) - tokens
        if clamped:
            self.notes.append(words.clamped(clamped))
        if not self.replayed:
            self.notes.append(words.NO_ROUTING)
        if tokens < MIN_TOKENS:
            return self._explanation(tokens, words.too_few(tokens, MIN_TOKENS), None)
        best = min(h.k3 for h in self.hypotheses)
        factor = FACTOR if best <= self.precise else FACTOR_UNEXPLAINED
        kept, needed = needed_causes(self.hypotheses, floor=self.floor, factor=factor)
        if best >= OTHER_WEIGHTS_NATS:
            kept, needed = self._as_trainer(ShiftedView(replayed=self.replayed)), []
        self._name(kept, needed)
        if best < OTHER_WEIGHTS_NATS:
            self._rows(kept, factor)
        self._versions(kept)
        remaining = kept.k3
        # A checkpoint that was tried has its own remainder. Lagging versions stand for one that was not given.
        lagging = any(cause.name == "stale_sync" and "checkpoint" not in cause.figures for cause in self.causes)
        if remaining <= self.precise:
            self.causes.append(words.precision(remaining, self.floor, self.replayed))
        elif best >= OTHER_WEIGHTS_NATS and not lagging:
            self.causes.append(self._large(min(h.k3 for h in self.hypotheses)))
        elif not lagging:
            self.causes.append(
                words.unexplained(remaining, self.floor, self._lag(), len(self.inputs.names) - 1, self.replayed)
            )
        return self._explanation(tokens, words.verdict(self.causes), kept)

    def _large(self, least: float) -> Cause:
        """The cause of a large gap that no hypothesis explains: another sampling distribution, or other weights."""
        settings, agreement = self.inputs.settings, self.inputs.routing.get(0)
        differing = agreement.metrics()["differing_rows"] if agreement is not None and agreement.rows else None
        if settings.other:
            return words.declared_adjustment(settings.other, least, differing)
        if differing is not None and differing <= SAME_ROUTERS:
            return words.unknown_adjustment(least, differing)
        # Known settings without changes, or routers that chose differently, leave the weights as the only cause.
        alone = differing is not None or settings.other is not None
        return words.weights(
            least, self._correlation(), len(self.inputs.names) - 1, self._lag(), alone=alone, differing=differing
        )

    def _name(self, kept: Hypothesis, needed: Sequence[Needed]) -> None:
        without = {item.name: item.without.k3 for item in needed if item.significant}
        self.notes += [
            words.insignificant(item.name, item.without.k3, kept.k3) for item in needed if not item.significant
        ]
        named: list[tuple[float, Cause]] = []
        for name, gap in without.items():
            if name == ROUTING:
                cause = words.routing(gap, kept.k3, self.inputs.routing.get(kept.view.rows))
            elif name == WEIGHTS:
                cause = words.stale(self.inputs.names[kept.view.weights], gap, kept.k3)
            elif name == LOGPROBS:
                cause = words.shifted_logprobs(kept.shift, gap, kept.k3)
            elif name == TRUNCATION:
                cause = words.renormalised(kept.distribution, gap, kept.k3)
            elif name == ADJUSTMENT:
                declared = kept.distribution.adjustment == self.evidence.expected.adjustment
                cause = words.adjusted(kept.distribution.adjustment, declared, gap, kept.k3)
            else:
                continue  # a temperature and rows have rules of their own
            named.append((gap, cause))
        temperature = self._temperature(kept, without.get(TEMPERATURE))
        if temperature is not None:
            named.append((without.get(TEMPERATURE, 0.0), temperature))
        self.causes += [cause for _, cause in sorted(named, key=lambda item: -item[0])]

    def _temperature(self, kept: Hypothesis, without: float | None) -> Cause | None:
        """A temperature mistake, or log-probabilities of another distribution than the tokens were sampled from."""
        expected, reported, settings = self.evidence.expected, kept.distribution, self.inputs.settings
        sampled = self._sampled_from(kept)
        declared_raw = settings.logprobs_mode == RAW and (
            (without is not None and abs(math.log(reported.temperature)) < NOTICED)
            or (expected.truncated and not reported.truncated)
            or (expected.adjustment and not reported.adjustment)
        )
        if sampled is not None or declared_raw:
            return words.raw(reported, sampled, expected, without, kept.k3)
        if without is not None:
            return words.temperature(reported.temperature, expected.temperature, settings.temperature, without, kept.k3)
        return None

    def _sampled_from(self, kept: Hypothesis) -> words.Sampled | None:
        """The distribution that the sampled tokens are evidence for, if it differs from the reported one.

        None if the model does not explain the gap: it then says nothing about the tokens.
        """
        if kept.k3 > self.precise or kept.distribution.truncated or kept.distribution.adjustment:
            return None
        evidence, reported = self.evidence, kept.distribution.temperature
        candidates: list[words.Sampled] = []
        likeliest = evidence.likeliest_temperature(kept.view)
        nats = likeliest.nats - float(evidence.scored(kept.view, kept.distribution).sum())
        if nats >= LIKELIER_NATS and abs(math.log(likeliest.temperature / reported)) >= NOTICED:
            text = f"temperature {likeliest.temperature:.2f} ({likeliest.low:.2f} to {likeliest.high:.2f})"
            figures = {"sampled_temperature": likeliest.temperature}
            figures |= {"sampled_temperature_low": likeliest.low, "sampled_temperature_high": likeliest.high}
            candidates.append(words.Sampled(text=text, nats=nats, figures=figures))
        near = min((1.0, evidence.expected.temperature), key=lambda t: abs(math.log(t / reported)))
        excluded = evidence.never_sampled(kept.view, near)
        if excluded is not None and excluded[1] >= EXCLUDED_NATS and abs(math.log(near / reported)) < NOTICED:
            candidates.append(words.Sampled(text=f"{excluded[0]}, or so", nats=excluded[1], figures={}))
        return max(candidates, key=lambda candidate: candidate.nats, default=None)

    def _rows(self, kept: Hypothesis, factor: float) -> None:
        """Find faulty rows: replaying them unshifted gives a larger gap than live routing, or than shifted rows."""
        if not self.replayed or ROWS in {cause.name for cause in self.causes}:
            return

        def gap(replayed: bool, rows: int = 0) -> Tensor:
            view = ShiftedView(weights=kept.view.weights, replayed=replayed, rows=rows)
            return self.evidence.d(view, kept.shift, kept.distribution)

        as_saved, live = gap(True), gap(False)
        moved = {rows: gap(True, rows) for rows in (1, -1)}
        rows = min(moved, key=lambda rows: float(k3(moved[rows])))
        better = min((live, moved[rows]), key=lambda d: float(k3(d)))
        limit = factor * max(float(k3(better)), self.floor)
        if float(k3(as_saved)) <= limit or not is_smaller(better, as_saved):
            return
        repaired = float(k3(moved[rows])) <= factor * max(float(k3(live)), self.floor)
        figures = float(k3(as_saved)), float(k3(live)), float(k3(moved[rows]))
        differing = {at: sums.metrics()["differing_rows"] for at, sums in self.inputs.routing.items()}
        self.causes.insert(0, words.rows(rows if repaired else None, *figures, differing))

    def _versions(self, kept: Hypothesis) -> None:
        """Find a stale sync from the weight versions in the rollouts."""
        if kept.k3 <= self.precise or "stale_sync" in {cause.name for cause in self.causes}:
            return
        version = self.evidence.tokens.version
        groups = {
            int(v): kept.d[version == v] for v in version.unique() if int(v) >= 0 and (version == v).sum() >= MIN_TOKENS
        }
        lag = self._lag()
        if len(groups) > 1:
            newest = max(groups)
            for v, d in sorted(groups.items()):
                older, newer = float(k3(d)), float(k3(groups[newest]))
                if v < newest and older > FACTOR_UNEXPLAINED * max(newer, self.floor):
                    self.causes.append(words.stale_version(v, older, newest, newer))
                    return
        if lag and self._correlation() >= words.RELATED:
            self.causes.append(words.lagging(lag, kept.k3))

    def _lag(self) -> int:
        """How many versions the newest rollout is behind the trainer; 0 where either version is unknown."""
        current, version = self.inputs.settings.weight_version, self.evidence.tokens.version
        newest = int(version.max()) if len(version) else -1
        return 0 if current is None or newest < 0 else max(0, current - newest)

    def _correlation(self) -> float:
        view = ShiftedView(replayed=self.replayed)
        plain = Distribution(temperature=self.evidence.expected.temperature)
        return correlation(self.evidence.scored(view, plain), self.evidence.tokens.shifted(0))

    def _explanation(self, tokens: int, verdict: str, kept: Hypothesis | None) -> Explanation:
        figures = {"live": self.live.k3 if tokens else math.nan}
        if self.replayed:
            figures["replayed"] = self._as_trainer(ShiftedView(replayed=True)).k3
        if kept is not None:
            figures["remaining"] = kept.k3
        figures["precision"] = self.floor
        return Explanation(
            tokens=tokens,
            rollouts=self.inputs.rollouts,
            verdict=verdict,
            causes=tuple(self.causes),
            k3=figures,
            correlation=self._correlation(),
            tried=self._tried(),
            notes=tuple(self.notes),
        )

    def _tried(self) -> tuple[Tried, ...]:
        best: dict[frozenset[str], Hypothesis] = {}
        for h in self.hypotheses:
            if h.causes not in best or h.k3 < best[h.causes].k3:
                best[h.causes] = h
        ranked = sorted(best.values(), key=lambda h: (h.k3, len(h.causes)))
        return tuple(
            Tried(
                text=words.hypothesis(h, self.inputs.names),
                causes=tuple(sorted(h.causes)),
                k3=h.k3,
                abs_mean=h.abs_mean,
            )
            for h in ranked
        )


def decide(inputs: DecisionInputs) -> Explanation:
    """Decide which causes explain the gap."""
    return _Decision(inputs).run()
