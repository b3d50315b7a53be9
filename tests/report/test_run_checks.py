"""What a report calls wrong: each check finds what it is for, and is silent on a sound run and without its records."""

import random

import pytest
from run_folders import step_metrics

from r3.report.narrative import in_words, times
from r3.report.run_checks import checks

STEPS = 12


def run(changes=None, *, steps=STEPS):
    """Records of a sound run, each changed by `changes(step, record)`."""
    rng = random.Random(1)
    records = []
    for step in range(1, steps + 1):
        record = {"step": step} | step_metrics(step, rng, layers=12, experts=8, replay=True, steps=steps)
        records.append(record | (changes(step, record) if changes else {}))
    return records


def found(records, settings=None):
    return {check.name: check.found for check in checks(records, settings or {})}


WRONG = {
    "engine at the start": (
        {"engine/differing_rows": 0.84},
        "Before the first step, the trainer's routers choose other experts in 84% of rows",
    ),
    "gap": ({"logprob_diff/replayed/k3": 2.1e-3}, "k3 is above 2.00e-03 in 12 of 12 steps, 2.10e-03 at most"),
    "extreme tokens": ({"logprob_diff/replayed/extreme_frac": 0.0011}, "above 0.10% in 12 of 12 steps, 0.11% at most"),
    "too large for routing": ({"logprob_diff/replayed/abs_mean": 0.51}, "|d| is 0.51 nats on average"),
    "replay helps": (
        {"logprob_diff/live/k3": 1.5e-4, "logprob_diff/replayed/k3": 1.5e-4},
        "does not make the gap smaller",
    ),
    "agreement": ({"routing/differing_rows": 0.51}, "51.0% of choices differ"),
    "outlying layer": ({"routing/differing_rows/layer_07": 0.4}, "Layer 7 stands out: 40.0% of its choices"),
    "coverage": ({"routing/coverage": 0.9899}, "less than 99.0% of the rows in 12 of 12 steps, 99.0% at the least"),
    "version lag": ({"routing/version_lag_max": 5}, "up to 5 weight versions behind the trainer, more than 2"),
    "tokens": ({"logprob_diff/live/tokens": 0}, "12 measurements had no tokens"),
    "reward": ({"reward/mean": 0.25}, "The reward is 0.250 in every step"),
    "numbers": ({"logprob_diff/live/k3": None}, "nothing to measure: logprob_diff/live/k3 (12 steps)"),
}


def test_a_sound_run_is_silent():
    assert set(found(run()).values()) == {""}


@pytest.mark.parametrize("name", WRONG)
def test_each_check_finds_its_fault(name):
    change, text = WRONG[name]
    said = found(run(lambda step, record: change))
    assert text in said[name]
    assert said[name].endswith(".")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("growth", lambda s, r: {"logprob_diff/replayed/k3": 1e-4 * (4 if s > 8 else 1)}, "grew 4 times"),
        ("expert load", lambda s, r: {"routing/load_entropy/live": 0.9 - 0.02 * s}, "from 0.85 to 0.69"),
        ("sync", lambda s, r: {"sync/version": 3 if s == 5 else s}, "did not rise 1 times"),
        ("sync", lambda s, r: {"sync/seconds": 30.0 if s == 5 else 2.0}, "took 30 s, the median one 2 s"),
        (
            "replay helps",
            lambda s, r: {"logprob_diff/replayed/k3": 3 * r["logprob_diff/live/k3"]},
            "The gap is 3 times larger with replay than without",
        ),
    ],
)
def test_faults_that_take_several_steps(name, changes, text):
    assert text in found(run(changes))[name]


@pytest.mark.parametrize("name", [*WRONG, "growth", "expert load", "sync"])
def test_without_records_a_check_is_not_made(name):
    assert found([{"step": 1, "other": 1.0}] * 6)[name] is None


def test_just_within_the_bounds():
    change = {
        "logprob_diff/replayed/k3": 2e-3,
        "logprob_diff/live/k3": 2.3e-3,
        "logprob_diff/replayed/extreme_frac": 1e-3,
        "logprob_diff/replayed/abs_mean": 0.5,
        "routing/differing_rows": 0.5,
        "routing/coverage": 0.99,
        "routing/version_lag_max": 2,
    }
    assert set(found(run(lambda step, record: change)).values()) == {""}


def test_the_bounds_of_the_runs_own_alarms_count():
    own = {"trainer.diagnostics.alarms.k3_warn": 1e-6, "trainer.diagnostics.alarms.coverage_warn": 0.5}
    assert "above 1.00e-06" in found(run(), own)["gap"]
    assert found(run(lambda step, record: {"routing/coverage": 0.6}), own)["coverage"] == ""


def test_equal_routing_and_an_equal_gap_are_no_fault_of_replay():
    same = {"logprob_diff/live/k3": 1e-6, "logprob_diff/replayed/k3": 1e-6, "routing/differing_rows": 0.0}
    assert found(run(lambda step, record: same))["replay helps"] == ""


@pytest.mark.parametrize(
    ("above", "below", "text"),
    [
        (6.0, 1.0, "6 times smaller"),
        (1.0, 6.0, "6 times larger"),
        (1.0, 1.09, "the same within 10%"),
        (0.0, 0.0, "the same within 10%"),
        (1.0, 0.0, "smaller"),
        (0.0, 1.0, "larger"),
    ],
)
def test_comparisons_in_words(above, below, text):
    assert times(above, below) == text


def test_sentences_have_no_hole():
    whole = " ".join(in_words(run(), {"trainer.diagnostics.extreme_ratio": 3.0}))
    assert "outside [1/3, 3]" in whole
    assert "nan" not in whole
    assert in_words([{"step": 1}], {}) == []
    assert in_words([], {}) == []
