"""Reading and formatting of recorded metrics, shared by the terminal table and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAYER_PREFIX = "routing/differing_rows/layer_"
MISSING = "-"


def number(record: Mapping[str, Any], key: str) -> float:
    """The finite value of `key`, or NaN if it is absent, null, not finite or not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def layer_shares(record: Mapping[str, Any]) -> dict[int, float]:
    """Share of differing rows by decoder layer, in order of the layers."""
    found = {int(key[len(LAYER_PREFIX) :]): number(record, key) for key in record if _is_layer(key)}
    return {layer: found[layer] for layer in sorted(found) if not math.isnan(found[layer])}


def _is_layer(key: str) -> bool:
    return key.startswith(LAYER_PREFIX) and key[len(LAYER_PREFIX) :].isdecimal()


def scientific(value: float) -> str:
    return f"{value:.2e}"


def fixed(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def whole(value: float) -> str:
    return f"{value:.0f}"


def grouped(value: float) -> str:
    return f"{value:,.0f}"


def mib(value: float) -> str:
    return f"{value / 2**20:,.1f}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


@dataclass(frozen=True)
class Column:
    """One column of the steps table; several keys share a cell, separated by slashes."""

    heading: str
    keys: tuple[str, ...]
    form: Callable[[float], str]
    rank: int
    """The columns of the highest rank are the first to go when a terminal is too narrow."""

    def text(self, record: Mapping[str, Any]) -> str:
        values = [number(record, key) for key in self.keys]
        return " / ".join(MISSING if math.isnan(value) else self.form(value) for value in values)

    def recorded(self, records: Sequence[Mapping[str, Any]]) -> bool:
        return any(not math.isnan(number(record, key)) for record in records for key in self.keys)


def _both(metric: str) -> tuple[str, str]:
    return f"logprob_diff/live/{metric}", f"logprob_diff/replayed/{metric}"


COLUMNS = (
    Column("step", ("step",), whole, 0),
    Column("reward", ("reward/mean",), fixed, 0),
    Column("k3 live", _both("k3")[:1], scientific, 0),
    Column("k3 replayed", _both("k3")[1:], scientific, 0),
    Column("mean |diff| live / replayed", _both("abs_mean"), scientific, 2),
    Column("max |diff| live / replayed", _both("abs_max"), fixed, 3),
    Column("routing differs", ("routing/differing_rows",), percent, 1),
    Column("rows replayed / live", ("routing/rows_replayed", "routing/rows_live"), grouped, 4),
    Column("sync version", ("sync/version",), whole, 5),
    Column("sync MiB", ("sync/bytes",), mib, 7),
    Column("sync s", ("sync/seconds",), seconds, 6),
    Column("rollout s", ("time/rollout_s",), seconds, 8),
    Column("train s", ("time/train_s",), seconds, 8),
)
