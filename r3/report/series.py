"""Metrics over the steps of a run: means weighted by tokens, and series short enough to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r3.report.cells import number

MOST_POINTS = 250
"""A longer series is drawn in bins of steps."""
LARGEST = 1e300
"""A drawing's scale, which reaches beyond its values, cannot be computed for larger ones."""

Records = Sequence[dict[str, Any]]


def values(records: Records, key: str) -> list[float]:
    """The value of each step, NaN where it is not a finite number."""
    return [number(record, key) for record in records]


def known(records: Records, key: str) -> list[float]:
    return [value for value in values(records, key) if not math.isnan(value)]


def recorded(records: Records, key: str) -> bool:
    return any(not math.isnan(number(record, key)) for record in records)


def steps_of(records: Records) -> list[float]:
    """The step of each record, or its place where it has none."""
    found = values(records, "step")
    return [float(place) if math.isnan(step) else step for place, step in enumerate(found)]


def mean(numbers: Sequence[float]) -> float:
    # Divided first: the sum of numbers that are close to the largest of all has no float.
    return math.fsum(value / len(numbers) for value in numbers) if numbers else math.nan


def total(numbers: Iterable[float]) -> float:
    """The sum, infinite where no float holds it."""
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def weighted_mean(records: Records, key: str) -> tuple[float, str]:
    """Mean of a metric over the run, and what it is over: "tokens" where every step says how many it had, else "steps".

    Only a metric that is itself a mean over tokens is weighted by them, as those of `logprob_diff` are.
    """
    found = [(number(record, key), number(record, f"{key.rsplit('/', 1)[0]}/tokens")) for record in records]
    found = [(value, count) for value, count in found if not math.isnan(value)]
    tokens = total(count for _, count in found)
    if key.startswith("logprob_diff/") and tokens > 0:  # NaN is not
        return math.fsum(value * (count / tokens) for value, count in found), "tokens"
    return mean([value for value, _ in found]), "steps"


def thirds(records: Records, key: str) -> tuple[float, float]:
    """Means of the first and of the last third of the steps that have `key`; NaN with fewer than 6 of them."""
    have = [record for record in records if not math.isnan(number(record, key))]
    size = len(have) // 3
    if size < 2:
        return math.nan, math.nan
    return weighted_mean(have[:size], key)[0], weighted_mean(have[-size:], key)[0]


@dataclass(frozen=True)
class Series:
    """Points to draw; each stands for `width` steps, whose values lie between `low` and `high`."""

    steps: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]
    width: int


def series(records: Records, key: str, *, factor: float = 1.0, log: bool = False, largest: bool = False) -> Series:
    """`factor` times a metric over the steps, in bins where there are many; the middle is a mean, or the largest.

    Steps whose value is not known, as those between two measured ones, or that the scale, or a `log` scale, cannot
    show, are left out.
    """
    smallest = 1 / LARGEST if log else -LARGEST
    pairs = zip(steps_of(records), values(records, key), strict=True)
    points = [(step, value * factor) for step, value in pairs if smallest <= value * factor <= LARGEST]
    width = max(1, math.ceil(len(points) / MOST_POINTS))
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    bins = [[value for _, value in part] for part in parts]
    return Series(
        steps=[mean([step for step, _ in part]) for part in parts],
        middle=[max(found) if largest else mean(found) for found in bins],
        low=[min(found) for found in bins],
        high=[max(found) for found in bins],
        width=width,
    )
