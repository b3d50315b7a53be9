"""Alarms: metrics beyond bounds that warn, or that stop the run.

`docs/reference/alarms-and-sinks.md` says why the bounds are so.

A metric that an alarm watches and that is missing, or no number, raises it too: a run that measures nothing must not
look healthy. At a step at which nothing was to be measured, only what is recorded all the same is looked at.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r3.config import DiagnosticsConfig
from r3.errors import AlarmError, summary

logger = logging.getLogger("r3")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A metric with bounds: the first of `keys` that is recorded. `below`: whether low values are the bad ones."""

    name: str
    keys: tuple[str, ...]
    remedy: str
    below: bool = False


def _either_side(name: str) -> tuple[str, str]:
    return f"logprob_diff/replayed/{name}", f"logprob_diff/live/{name}"


WATCHED = (
    Watched(
        name="k3",
        keys=_either_side("k3"),
        remedy="r3 explain --model --rollout on a saved rollout says what the gap comes from",
    ),
    Watched(
        name="extreme_frac",
        keys=_either_side("extreme_frac"),
        remedy="the report's worst tokens show where; r3 explain --model --rollout says what it comes from",
    ),
    Watched(
        name="coverage",
        keys=("routing/coverage",),
        remedy="rows without routing are routed live; r3 doctor checks the capture",
        below=True,
    ),
    Watched(
        name="version_lag",
        keys=("routing/version_lag_max",),
        remedy="rollouts are older than the settings allow: sync more often, or keep fewer rollouts in flight",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One metric beyond a bound, or not there."""

    name: str
    key: str
    value: float | None
    """None if the metric is missing or no number."""
    bound: float | None
    """The bound that is crossed; None if the metric is missing."""
    stops: bool
    text: str


def find_alarms(config: DiagnosticsConfig, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
    """What is wrong with the metrics of `step`; nothing if alarms are off."""
    if not config.alarms.enabled:
        return []
    found = []
    for watched in WATCHED:
        warn, stop = config.alarms.bounds(watched.name)
        if config.measures(step) or any(key in metrics for key in watched.keys):
            found.append(_alarm(watched, warn, stop, metrics))
    return [alarm for alarm in found if alarm is not None]


class Alarms:
    """Watches the metrics of a run, step by step.

    >>> from r3.config import AlarmsConfig
    >>> alarms = Alarms(DiagnosticsConfig(alarms=AlarmsConfig(enabled=True)))
    >>> alarms.check(1, {"logprob_diff/live/k3": 3.0})
    Traceback (most recent call last):
    r3.errors.AlarmError: ...
    """

    def __init__(self, config: DiagnosticsConfig) -> None:
        self.config = config

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Log a warning for each alarm that warns, and return them.

        Raises `AlarmError` if any stops, after the warnings; it names them all. Record the step's metrics first.
        """
        alarms = find_alarms(self.config, step, metrics)
        for alarm in alarms:
            if not alarm.stops:
                logger.warning("alarm at step %d: %s", step, alarm.text)
        if stopping := [alarm.text for alarm in alarms if alarm.stops]:
            raise AlarmError(f"stopped at step {step} by trainer.diagnostics.alarms:{summary(stopping)}")
        return alarms


def _alarm(watched: Watched, warn: float | None, stop: float | None, metrics: Mapping[str, Any]) -> Alarm | None:
    if warn is None and stop is None:
        return None
    key = next((key for key in watched.keys if key in metrics), None)
    value = math.nan if key is None else _number(metrics[key])
    if math.isnan(value):
        return _missing(watched, key, None if key is None else metrics[key], stops=stop is not None)
    for bound, kind in ((stop, "stop"), (warn, "warn")):
        if bound is not None and (value < bound if watched.below else value > bound):
            assert key is not None
            side = "below" if watched.below else "above"
            text = f"{key} is {value:.4g}, {side} {watched.name}_{kind}={bound:g}; {watched.remedy}"
            return Alarm(name=watched.name, key=key, value=value, bound=bound, stops=kind == "stop", text=text)
    return None


def _missing(watched: Watched, key: str | None, value: Any, *, stops: bool) -> Alarm:
    names = " or ".join(watched.keys) if key is None else key
    found = "not recorded" if key is None else f"no number but {value!r}"
    text = (
        f"{names} is {found}, although {watched.name} is watched: nothing was measured, or what was measured is "
        f"broken; mend that, or set trainer.diagnostics.alarms.{watched.name}_warn and {watched.name}_stop to null"
    )
    return Alarm(name=watched.name, key=key or watched.keys[0], value=None, bound=None, stops=stops, text=text)


def _number(value: Any) -> float:
    """`value` as a float, NaN if it is no number; infinities are beyond every bound."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
