"""Alarms: each bound, what is missing, and when nothing was to be measured."""

import logging
import math
import pickle

import numpy as np
import pytest
import torch

from r3.config import AlarmsConfig, DiagnosticsConfig
from r3.diagnostics import Alarms, find_alarms
from r3.errors import AlarmError, R3Error

HEALTHY = {
    "logprob_diff/live/k3": 5e-4,
    "logprob_diff/replayed/k3": 8e-5,
    "logprob_diff/live/extreme_frac": 1e-4,
    "logprob_diff/replayed/extreme_frac": 0.0,
    "routing/coverage": 1.0,
    "routing/version_lag_max": 1.0,
}
OFF = {
    f"{name}_{kind}": None for name in ("k3", "extreme_frac", "coverage", "version_lag") for kind in ("warn", "stop")
}
KEYS = {
    "k3": "logprob_diff/replayed/k3",
    "extreme_frac": "logprob_diff/replayed/extreme_frac",
    "coverage": "routing/coverage",
    "version_lag": "routing/version_lag_max",
}


def watching(every=1, **bounds):
    return DiagnosticsConfig(every=every, alarms=AlarmsConfig(enabled=True, **(OFF | bounds)))


def test_a_healthy_step_raises_none():
    assert find_alarms(DiagnosticsConfig(alarms=AlarmsConfig(enabled=True)), 1, HEALTHY) == []


def test_alarms_are_off_unless_enabled():
    assert Alarms(DiagnosticsConfig()).check(1, {}) == []


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("kind", ["warn", "stop"])
def test_each_bound_is_crossed_by_what_is_beyond_it_and_not_by_itself(name, kind, caplog):
    key, bound = KEYS[name], 0.5
    beyond = math.nextafter(bound, 0 if name == "coverage" else 1)
    within = math.nextafter(bound, 1 if name == "coverage" else 0)
    alarms = Alarms(watching(**{f"{name}_{kind}": bound}))
    for value in (bound, within):
        assert alarms.check(3, {key: value}) == []
    assert caplog.text == ""
    side = "below" if name == "coverage" else "above"
    text = f"{key} is 0.5, {side} {name}_{kind}=0.5; "
    if kind == "stop":
        with pytest.raises(AlarmError, match=r"stopped at step 3 by trainer\.diagnostics\.alarms") as caught:
            alarms.check(3, {key: beyond})
        assert text in str(caught.value)
        assert caplog.text == ""
    else:
        (alarm,) = alarms.check(3, {key: beyond})
        assert (alarm.name, alarm.key, alarm.value, alarm.bound, alarm.stops) == (name, key, beyond, bound, False)
        assert alarm.text.startswith(text)
        assert f"alarm at step 3: {text}" in caplog.text


def test_a_value_beyond_both_bounds_stops_and_is_named_once():
    (alarm,) = find_alarms(watching(k3_warn=0.1, k3_stop=0.2), 1, {"logprob_diff/live/k3": 0.3})
    assert alarm.stops
    assert alarm.bound == 0.2


@pytest.mark.parametrize("name", ["k3", "extreme_frac"])
def test_the_replayed_side_is_watched_where_it_is_recorded(name):
    live, replayed = f"logprob_diff/live/{name}", f"logprob_diff/replayed/{name}"
    config = watching(**{f"{name}_warn": 0.1})
    assert find_alarms(config, 1, {live: 0.9, replayed: 0.0}) == []
    assert [alarm.key for alarm in find_alarms(config, 1, {live: 0.0, replayed: 0.9})] == [replayed]
    assert [alarm.key for alarm in find_alarms(config, 1, {live: 0.9})] == [live]
    # A replayed side that is broken is not made good by a live one that is not.
    assert [alarm.key for alarm in find_alarms(config, 1, {live: 0.0, replayed: math.nan})] == [replayed]


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", [math.nan, None, "0.1", True, torch.tensor(math.nan), np.float32(math.nan)])
def test_what_is_no_number_is_an_alarm(name, value):
    (warned,) = find_alarms(watching(**{f"{name}_warn": 0.5}), 1, {KEYS[name]: value})
    assert (warned.value, warned.bound, warned.stops) == (None, None, False)
    assert f"{KEYS[name]} is no number but" in warned.text
    (stopped,) = find_alarms(watching(**{f"{name}_stop": 0.5}), 1, {KEYS[name]: value})
    assert stopped.stops


@pytest.mark.parametrize("name", KEYS)
def test_what_is_missing_is_an_alarm_that_says_what_to_do(name):
    with pytest.raises(AlarmError) as caught:
        Alarms(watching(**{f"{name}_stop": 0.5})).check(2, {"reward/mean": 1.0})
    text = str(caught.value)
    assert f"{KEYS[name]} " in text
    assert f"is not recorded, although {name} is watched" in text
    assert f"set trainer.diagnostics.alarms.{name}_warn and {name}_stop to null" in text


def test_steps_that_are_not_measured_are_left_alone():
    alarms = Alarms(watching(every=4, k3_stop=0.5))
    for step in (2, 3, 4, 6):
        assert alarms.check(step, {}) == []
    for step in (1, 5, 9):
        with pytest.raises(AlarmError, match="not recorded"):
            alarms.check(step, {})


@pytest.mark.parametrize("value", [0.4, math.nan])
def test_what_is_recorded_at_steps_between_is_watched_all_the_same(value):
    alarms = Alarms(watching(every=4, k3_stop=0.5, coverage_stop=0.5))
    assert alarms.check(2, {"routing/coverage": 0.5}) == []
    with pytest.raises(AlarmError, match=r"stopped at step 2 .*:\n  routing/coverage is"):
        alarms.check(2, {"routing/coverage": value})


@pytest.mark.parametrize("value", [math.inf, torch.tensor(math.inf), np.float64(math.inf), 10**309])
def test_an_infinite_gap_stops(value):
    (alarm,) = find_alarms(watching(k3_stop=0.5), 1, {"logprob_diff/live/k3": value})
    assert (alarm.value, alarm.bound) == (math.inf, 0.5)


def test_all_alarms_of_a_step_are_said_and_warnings_come_first(caplog):
    config = watching(k3_warn=0.1, coverage_stop=0.9, version_lag_stop=2)
    with pytest.raises(AlarmError) as caught:
        Alarms(config).check(7, {"logprob_diff/live/k3": 0.2, "routing/coverage": 0.5, "routing/version_lag_max": 3})
    text = str(caught.value)
    assert "routing/coverage is 0.5, below coverage_stop=0.9" in text
    assert "routing/version_lag_max is 3, above version_lag_stop=2" in text
    assert "k3" not in text
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "alarm at step 7: logprob_diff/live/k3 is 0.2, above k3_warn=0.1" in record.getMessage()


def test_the_error_is_one_of_this_project_and_travels_between_processes():
    with pytest.raises(AlarmError) as caught:
        Alarms(watching(k3_stop=0.5)).check(1, {})
    assert isinstance(caught.value, R3Error)
    assert isinstance(caught.value, RuntimeError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
