"""What the lines of `details.jsonl` hold, checked piece by piece: a piece of another form counts as not recorded.

A folder may have been written by another version, or by hand; whatever is in it, the report shows the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIDES = ("live", "replayed")

Bins = list[tuple[float, float, int]]


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """One of the tokens with the largest |d|. What is not known is NaN, empty or None."""

    sample: int | None
    position: int | None
    token: str
    before: str
    after: str
    live: float
    replayed: float
    rollout: float
    layers: tuple[int, ...] | None

    def diff(self, side: str) -> float:
        """Train - rollout, nats."""
        return getattr(self, side) - self.rollout


def pairs(detail: Mapping[str, Any], side: str) -> tuple[list[float], list[float]]:
    """(rollout, train) log-probabilities of the drawn tokens that have both; empty where they are not recorded."""
    tokens = _mapping(detail.get("tokens"))
    rollout, train = _list(tokens.get("rollout")), _list(tokens.get(side))
    if len(rollout) != len(train):
        return [], []
    both = [(a, b) for a, b in zip(map(_number, rollout), map(_number, train), strict=True) if math.isfinite(a + b)]
    return [a for a, _ in both], [b for _, b in both]


def histogram(detail: Mapping[str, Any], side: str) -> Bins:
    """(lower, upper, count) of d, ascending and apart; empty where it is not recorded."""
    found: Bins = []
    for entry in _list(_mapping(detail.get("histogram")).get(side)):
        lower, upper, count = map(_number, entry) if isinstance(entry, list) and len(entry) == 3 else (math.nan,) * 3
        if not (lower <= upper and count >= 0 and math.isfinite(lower + upper + count)):
            return []
        found.append((lower, upper, int(count)))
    return sorted(found)


def worst_tokens(detail: Mapping[str, Any]) -> list[WorstToken]:
    """Those that have a rollout's log-probability and a trainer's."""
    found = []
    for entry in map(_mapping, _list(detail.get("worst"))):
        values = {name: _number(entry.get(name)) for name in (*SIDES, "rollout")}
        if math.isnan(values["rollout"]) or all(math.isnan(values[side]) for side in SIDES):
            continue
        layers = entry.get("layers")
        found.append(
            WorstToken(
                sample=_whole(entry.get("sample")),
                position=_whole(entry.get("position")),
                token=_text(entry.get("token")),
                before=_text(entry.get("before")),
                after=_text(entry.get("after")),
                live=values["live"],
                replayed=values["replayed"],
                rollout=values["rollout"],
                layers=tuple(layer for layer in layers if _whole(layer) is not None)
                if isinstance(layers, list)
                else None,
            )
        )
    return found


@dataclass(frozen=True)
class Load:
    """Load of each expert over its layer's mean load, `[L][E]`, of one side."""

    layers: list[int]
    loads: list[list[float]]


def load(detail: Mapping[str, Any], side: str) -> Load | None:
    """Of "live" or "rollout"; None where it is not recorded."""
    table = _mapping(detail.get("load"))
    layers, counts = _list(table.get("layer_ids")), _list(table.get(side))
    if not layers or len(layers) != len(counts) or not all(_whole(layer) is not None for layer in layers):
        return None
    rows = [[_number(count) for count in _list(row)] for row in counts]
    width = len(rows[0])
    if not width or any(len(row) != width or not all(count >= 0 for count in row) for row in rows):
        return None
    return Load(layers, [[count * width / (sum(row) or 1.0) for count in row] for row in rows])


def tokens_seen(detail: Mapping[str, Any]) -> int | None:
    """How many tokens the drawn ones are from."""
    return _whole(detail.get("tokens_seen"))


def last_with(details: Sequence[Mapping[str, Any]], has: Any) -> Mapping[str, Any] | None:
    """The last of `details` for which `has(detail)` is true."""
    return next((detail for detail in reversed(details) if has(detail)), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
