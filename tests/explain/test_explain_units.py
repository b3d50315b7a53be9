"""The parts of `r3 explain`: distributions against the warpers of transformers, shifts, gaps, pruning."""

import math
from dataclasses import replace

import pytest
import torch
from faulty_rollouts import processed

from r3.capture import SamplingSettings
from r3.explain.adjustments import Before
from r3.explain.decision import DecisionInputs, decide
from r3.explain.distributions import (
    SORTED,
    TEMPERATURES,
    Distribution,
    candidates,
    exclusions,
    interpolate,
    place_of,
    score,
    signed_mass,
)
from r3.explain.evidence import Evidence, ScoredTokens, is_smaller, k3
from r3.explain.hypotheses import Hypothesis, needed_causes
from r3.explain.scoring import ShiftedView


def random_logits(n=400, v=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 2.5
    labels = (logits / 0.8).softmax(-1).multinomial(1, generator=generator)[:, 0]
    return logits, labels


def alone(labels):
    """Each label as the first that its request sampled, after a prompt of one token."""
    n = len(labels)
    return Before(
        input_ids=labels[:, None] * 0, row=torch.arange(n), begin=torch.ones(n).long(), end=torch.ones(n).long()
    )


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"temperature": 0.6},
        {"top_p": 0.9},
        {"top_p": 0.5, "temperature": 1.3},
        {"top_k": 7},
        {"top_k": 1},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    ],
)
def test_scores_are_those_of_the_warpers(kind):
    logits, labels = random_logits()
    reference = processed(logits.double(), **kind).gather(1, labels[:, None])[:, 0]
    found = score(logits, labels, [Distribution(**kind)])[0].double()
    inside = reference.isfinite()
    assert inside.sum() > 20
    torch.testing.assert_close(found[inside], reference[inside], atol=2e-5, rtol=0)
    if kind.get("top_k") or "top_p" in kind:
        mass = signed_mass(logits, labels, [Distribution(**kind)])[0].double()
        assert torch.equal(mass > 0, inside)
        whole = processed(logits.double(), temperature=kind.get("temperature", 1.0)).exp()
        kept = (whole * processed(logits.double(), **kind).isfinite()).sum(-1)
        torch.testing.assert_close(mass.abs(), kept, atol=2e-5, rtol=0)
        torch.testing.assert_close(found, (whole.gather(1, labels[:, None])[:, 0] / kept).log(), atol=2e-5, rtol=0)


def test_a_nucleus_that_needs_more_than_is_sorted_has_the_mass_that_was_asked():
    logits = torch.zeros(3, 2 * SORTED)
    labels = torch.tensor([0, 1, 2])
    found = score(logits, labels, [Distribution(top_p=0.9)])[0]
    torch.testing.assert_close(found, torch.full((3,), math.log(1 / (2 * SORTED * 0.9))), atol=1e-3, rtol=0)


def test_chunks_change_nothing(monkeypatch):
    logits, labels = (part[:12] for part in random_logits())
    chosen = candidates(Distribution(), 300)[::17]
    whole = score(logits, labels, chosen, alone(labels))
    monkeypatch.setattr("r3.explain.distributions._CHUNK_BYTES", 1)
    assert torch.equal(score(logits, labels, chosen, alone(labels)), whole)
    assert score(logits[:0], labels[:0], chosen).shape == (len(chosen), 0)


@pytest.mark.parametrize("temperature", [0.26, 0.7, 0.99, 1.234, 3.9])
def test_temperatures_between_those_of_the_table_are_interpolated(temperature):
    logits, labels = random_logits()
    table = score(logits.double(), labels, [Distribution(temperature=t) for t in TEMPERATURES]).double()
    exact = processed(logits.double(), temperature=temperature).gather(1, labels[:, None])[:, 0]
    found = interpolate(table, place_of(temperature))
    assert float(k3(found - exact)) < 1e-8


def test_candidates_begin_with_what_is_expected_and_repeat_nothing():
    for expected in (Distribution(), Distribution(temperature=0.65, top_p=0.93, top_k=12)):
        found = candidates(expected, 50)
        assert len(set(found)) == len(found)
        assert Distribution(temperature=expected.temperature) in found
        assert all(d.top_k < 50 for d in found)
        assert (expected in found) == (expected != Distribution(temperature=9.0))
        assert {d.temperature for d in exclusions(expected, 50)} == {1.0, expected.temperature}


def tokens(reported, rollout, position, version=None) -> ScoredTokens:
    reported = torch.tensor(reported, dtype=torch.float64)
    return ScoredTokens(
        reported=reported,
        usable=reported > -1000,
        rollout=torch.tensor(rollout),
        position=torch.tensor(position),
        version=torch.full((len(reported),), -1) if version is None else torch.tensor(version),
    )


def test_shifts_stay_within_a_rollout_and_skip_what_was_not_sampled():
    # The second rollout's fifth token was not sampled; the last is a clamp.
    # It begins where the first one ends: nothing before it was sampled.
    given = tokens([-1.0, -2.0, -3.0, -4.0, -5.0, -9999.0], [0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 5, 6])
    nan = math.nan
    for shift, expected in (
        (0, [-1.0, -2.0, -3.0, -4.0, -5.0, nan]),
        (1, [-2.0, nan, -4.0, nan, nan, nan]),
        (-1, [nan, -1.0, nan, -3.0, nan, -5.0]),
    ):
        torch.testing.assert_close(
            given.shifted(shift), torch.tensor(expected, dtype=torch.float64), equal_nan=True, atol=0, rtol=0
        )


def test_k3_is_its_formula_and_survives_extremes():
    d = torch.tensor([0.1, -0.2, math.nan, 1e-8], dtype=torch.float64)
    expected = sum(math.expm1(x) - x for x in (0.1, -0.2, 1e-8)) / 3
    assert float(k3(d)) == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(float(k3(torch.tensor([1e4, -1e4], dtype=torch.float64))))


def test_smaller_is_told_only_where_chance_does_not_explain_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator, dtype=torch.float64)
    other = torch.randn(4000, generator=generator, dtype=torch.float64)
    assert is_smaller(0.8 * noise, other)
    assert not is_smaller(noise, other)
    assert not is_smaller(0.8 * noise[:20], other[:20])
    assert not is_smaller(noise[:1] * 0, other[:1])
    # Live against replayed: a quarter of the tokens is a little worse, and three of them by a thousand times as much.
    live = noise.clone()
    live[:1000] += 1.5 * torch.randn(1000, generator=generator, dtype=torch.float64)
    live[:3] += 1000
    assert is_smaller(noise, live)
    few = noise.clone()
    few[:3] += 1000
    assert not is_smaller(noise, few)


def hypothesis(scale: float, *causes: str) -> Hypothesis:
    d = scale * torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Hypothesis(view=ShiftedView(), shift=0, distribution=Distribution(), causes=frozenset(causes), d=d)


def named(found, floor=1e-9, factor=2.0) -> set[str]:
    return {item.name for item in needed_causes(found, floor=floor, factor=factor)[1] if item.significant}


def test_pruning_keeps_what_is_needed_alone():
    none, a, b, both = hypothesis(1.0), hypothesis(0.1, "a"), hypothesis(0.9, "b"), hypothesis(0.099, "a", "b")
    assert named([none, a, b, both]) == {"a"}
    assert named([none]) == set()
    # Two ways that explain alike: the simpler one; two that are needed together: both.
    assert named([none, a, hypothesis(0.1, "b", "c")]) == {"a"}
    assert named([none, hypothesis(0.9, "a"), hypothesis(0.9, "b"), hypothesis(0.01, "a", "b")]) == {"a", "b"}
    # A few tokens alone: kept, so that the rest is judged with it, but not significant.
    d = a.d.clone()
    d[:3] += 50
    kept, needed = needed_causes([replace(none, d=d), a], floor=1e-9, factor=2.0)
    assert kept is a
    assert [(item.name, item.significant) for item in needed] == [("a", False)]
    # Below the floor, and within the factor, nothing counts.
    assert named([none, a], floor=1.0) == set()
    assert named([none, hypothesis(0.75, "a")]) == set()
    assert named([none, hypothesis(0.5, "a")]) == {"a"}
    assert named([none, hypothesis(0.5, "a")], factor=5.0) == set()


def test_what_never_occurs_speaks_for_a_truncation():
    n = 2000
    kept = torch.full((n,), 0.99)
    nothing_excluded = kept.clone()
    some = torch.where(torch.arange(n) % 100 == 0, -kept, kept)
    few = torch.where(torch.arange(n) % 400 == 0, -kept, kept)
    chosen = [Distribution(top_p=0.95)]

    def nats(mass):
        evidence = Evidence(
            tokens=tokens([], [], []),
            distributions=[],
            tables={},
            expected=Distribution(),
            exclusions=chosen,
            masses={ShiftedView(): mass[None]},
        )
        found = evidence.never_sampled(ShiftedView(), 1.0)
        return 0.0 if found is None else found[1]

    assert nats(nothing_excluded) == pytest.approx(20, rel=1e-4)  # E = 20, O = 0
    assert nats(some) == 0.0  # E = 20, O = 20
    assert nats(few) == pytest.approx(20 - 5 + 5 * math.log(5 / 20), rel=1e-4)


def test_a_temperature_that_makes_a_large_gap_smaller_is_not_named():
    """A model that is certain of tokens that were reported as unlikely: a higher temperature is better, not right."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 50, generator=generator)
    labels = torch.randint(0, 50, (1000,), generator=generator)
    logits[torch.arange(1000), labels] += 10
    chosen = candidates(Distribution(), 50)
    table = score(logits, labels, chosen, alone(labels))
    given = tokens((-8 + 0.5 * torch.randn(1000, generator=generator)).tolist(), [0] * 1000, list(range(1000)))
    evidence = Evidence(
        tokens=given,
        distributions=chosen,
        tables={ShiftedView(): table},
        expected=Distribution(),
        exclusions=(),
        masses={},
    )
    hot = float(k3(evidence.d(ShiftedView(), 0, Distribution(temperature=4.0))))
    assert hot < float(k3(evidence.d(ShiftedView(), 0, Distribution()))) / 5
    found = decide(
        DecisionInputs(
            evidence=evidence,
            precision={ShiftedView(): 1e-3 * torch.randn(table.shape, generator=generator)},
            routing={},
            settings=SamplingSettings(),
            names=["model"],
            rollouts=1,
        )
    )
    assert found.names == ("weights",)
