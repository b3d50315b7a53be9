"""Alarms: metrics beyond bounds that warn, or that stop the run.

`docs/reference/alarms-and-sinks.md` says why the bounds are so.

A metric that an alarm watches and that is missing, or no number, raises it too: a run that measures nothing must not
look healthy. At a step at which nothing was to be measured, only what is recorded all the same is looked at.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r3.config import DiagnosticsConfig
from r3.diagnostics.metric import Watch
from r3.diagnostics.registry import GROUPS, Group, declared
from r3.errors import AlarmError, summary

logger = logging.getLogger("r3")


def watched(groups: Sequence[Group] = GROUPS) -> list[tuple[Watch, tuple[str, ...]]]:
    """What is watched, each with its keys: the first that is recorded counts, replayed before live."""
    return [(metric.watch, keys[::-1]) for metric, keys in declared(groups) if metric.watch is not None]


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
    for watch, keys in watched():
        if config.measures(step) or any(key in metrics for key in keys):
            found.append(_alarm(watch, keys, config.alarms.bounds(watch.name), metrics))
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


def _alarm(
    watch: Watch, keys: tuple[str, ...], bounds: tuple[float | None, float | None], metrics: Mapping[str, Any]
) -> Alarm | None:
    warn, stop = bounds
    if warn is None and stop is None:
        return None
    key = next((key for key in keys if key in metrics), None)
    value = math.nan if key is None else _number(metrics[key])
    if key is None or math.isnan(value):
        found = "not recorded" if key is None else f"no number but {metrics[key]!r}"
        return _missing(watch.name, keys if key is None else [key], found, stops=stop is not None)
    for bound, kind in ((stop, "stop"), (warn, "warn")):
        if bound is not None and (value < bound if watch.worse == "lower" else value > bound):
            side = "below" if watch.worse == "lower" else "above"
            text = f"{key} is {value:.4g}, {side} {watch.name}_{kind}={bound:g}; {watch.remedy}"
            return Alarm(name=watch.name, key=key, value=value, bound=bound, stops=kind == "stop", text=text)
    return None


def _missing(name: str, keys: Sequence[str], found: str, *, stops: bool) -> Alarm:
    text = (
        f"{' or '.join(keys)} is {found}, although {name} is watched: nothing was measured, or what was measured is "
        f"broken; mend that, or set trainer.diagnostics.alarms.{name}_warn and {name}_stop to null"
    )
    return Alarm(name=name, key=keys[0], value=None, bound=None, stops=stops, text=text)


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
