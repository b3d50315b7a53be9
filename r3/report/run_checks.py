"""What looks wrong in the records of a run: checks, each with a bound that `docs/reference/report.md` gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from r3.config import AlarmsConfig
from r3.diagnostics.initial_mismatch import EngineAgreement
from r3.report.cells import number, percent, scientific
from r3.report.narrative import SAME, SIDES, diff_key, layer_means, paired, percent_down, share_text, times
from r3.report.series import Records, known, mean, recorded, thirds, weighted_mean

GROWTH = 3.0
OUTLYING_LAYER = 3.0
NOT_ROUTING_NATS = 0.5
MOST_DIFFERING = 0.5
SLOW = 5.0
EVEN_LOAD_LOST = 0.1


@dataclass(frozen=True)
class Check:
    """One thing that was looked for: `found` is what looks wrong, empty if nothing does, None if it is not recorded."""

    name: str
    found: str | None


def checks(records: Records, settings: Mapping[str, Any]) -> list[Check]:
    """All checks of a run."""
    made: dict[str, Callable[[Records], str | None]] = {
        "engine at the start": _engine,
        "gap": lambda r: _beyond(r, settings, "k3", "k3"),
        "extreme tokens": lambda r: _beyond(r, settings, "extreme_frac", "extreme_frac"),
        "too large for routing": _not_routing,
        "replay helps": _no_help,
        "growth": _growth,
        "agreement": _disagreement,
        "outlying layer": _outlying_layer,
        "coverage": lambda r: _low_coverage(r, settings),
        "version lag": lambda r: _old(r, settings),
        "expert load": _uneven,
        "tokens": _no_tokens,
        "reward": _stuck_reward,
        "sync": _syncs,
        "numbers": _nulls,
    }
    return [Check(name, check(records)) for name, check in made.items()]


def _engine(records: Records) -> str | None:
    names = [f"engine/{metric.name}" for metric in EngineAgreement.METRICS]
    measured = [{n: number(record, n) for n in names if not math.isnan(number(record, n))} for record in records]
    found = [figures for figures in measured if "engine/k3_live" in figures]
    if not found:
        return None
    faults = EngineAgreement.from_record("the model", found[0]).faults()
    return " ".join(f"Before the first step, {text[0].lower()}{text[1:]}." for text in faults.values())


def _bound(settings: Mapping[str, Any], name: str) -> float:
    """What the run's own alarm warns at, else the default of the alarms."""
    own = number(settings, f"trainer.diagnostics.alarms.{name}_warn")
    default = AlarmsConfig().bounds(name)[0]
    return default if math.isnan(own) and default is not None else own


def _best_side(records: Records, name: str) -> str | None:
    """The side that trains: replayed where it is recorded."""
    return next((side for side in reversed(SIDES) if recorded(records, diff_key(side, name))), None)


def _beyond(records: Records, settings: Mapping[str, Any], name: str, alarm: str) -> str | None:
    side = _best_side(records, name)
    if side is None:
        return None
    bound, found = _bound(settings, alarm), known(records, diff_key(side, name))
    above = [value for value in found if value > bound]
    what = "k3" if name == "k3" else "the share of extreme tokens"
    shown = scientific if name == "k3" else share_text
    if not above:
        return ""
    return (
        f"With {side} routing, {what} is above {shown(bound)} in {len(above)} of {len(found)} steps, "
        f"{shown(max(above))} at most: ratios of such a gap make updates noisy."
    )


def _not_routing(records: Records) -> str | None:
    side = _best_side(records, "abs_mean")
    if side is None:
        return None
    found = weighted_mean(records, diff_key(side, "abs_mean"))[0]
    return (
        f"|d| is {found:.2g} nats on average with {side} routing. Neither routing nor precision makes a gap of that "
        f"size: look for rows shifted by a position, other weights in the engine, or a temperature that one side lacks."
        if found > NOT_ROUTING_NATS
        else ""
    )


def _no_help(records: Records) -> str | None:
    both = paired(records, "k3")
    if not both:
        return None
    live, replayed = mean([a for a, _ in both]), mean([b for _, b in both])
    if replayed * SAME <= live or live == replayed == 0:
        return ""
    differs = known(records, "routing/differing_rows")
    if differs and mean(differs) == 0:
        return ""
    if replayed > live * SAME:
        return (
            f"The gap is {times(live, replayed)} with replay than without: the replayed rows are not those of these "
            f"tokens, or replay changes more than the choice of experts."
        )
    return "Replay does not make the gap smaller: most of it comes from something other than the choice of experts."


def _growth(records: Records) -> str | None:
    side = _best_side(records, "k3")
    first, last = thirds(records, diff_key(side, "k3")) if side else (math.nan, math.nan)
    if math.isnan(first + last):
        return None
    return (
        f"The gap with {side} routing grew {last / first:.2g} times from the first to the last third of the steps."
        if 0 < first * GROWTH < last
        else ""
    )


def _disagreement(records: Records) -> str | None:
    found = known(records, "routing/differing_rows")
    if not found:
        return None
    return (
        f"{percent(mean(found))} of choices differ between live and rollout; different kernels explain about a tenth. "
        f"Rows may be shifted by a position, layers paired wrongly, or the two sides may have other weights."
        if mean(found) > MOST_DIFFERING
        else ""
    )


def _outlying_layer(records: Records) -> str | None:
    layers = layer_means(records)
    if len(layers) < 3:
        return None
    usual, most = median(layers.values()), max(layers, key=layers.__getitem__)
    return (
        f"Layer {most} stands out: {percent(layers[most])} of its choices differ, {percent(usual)} in the median layer."
        if layers[most] > max(OUTLYING_LAYER * usual, 0.02)
        else ""
    )


def _low_coverage(records: Records, settings: Mapping[str, Any]) -> str | None:
    found, bound = known(records, "routing/coverage"), _bound(settings, "coverage")
    low = [value for value in found if value < bound]
    if not found:
        return None
    if not low:
        return ""
    return (
        f"Routing was captured for less than {percent(bound)} of the rows in {len(low)} of {len(found)} steps, "
        f"{percent_down(min(low))} at the least: what is missing is routed live."
    )


def _old(records: Records, settings: Mapping[str, Any]) -> str | None:
    found, bound = known(records, "routing/version_lag_max"), _bound(settings, "version_lag")
    if not found:
        return None
    return (
        f"Rollouts were up to {max(found):.0f} weight versions behind the trainer, more than {bound:.0f}."
        if max(found) > bound
        else ""
    )


def _uneven(records: Records) -> str | None:
    first, last = thirds(records, "routing/load_entropy/live")
    if math.isnan(first + last):
        return None
    return (
        f"The load of experts became less even: its entropy went from {first:.2f} to {last:.2f} of the most it can be."
        if first - last > EVEN_LOAD_LOST
        else ""
    )


def _no_tokens(records: Records) -> str | None:
    found = [value for side in SIDES for value in known(records, diff_key(side, "tokens"))]
    if not found:
        return None
    empty = sum(value == 0 for value in found)
    return f"{empty} measurements had no tokens at all: everything was masked out." if empty else ""


def _stuck_reward(records: Records) -> str | None:
    found = known(records, "reward/mean")
    if len(found) < 3:
        return None
    return f"The reward is {found[0]:.3f} in every step." if len(set(found)) == 1 else ""


def _syncs(records: Records) -> str | None:
    versions, taken = known(records, "sync/version"), known(records, "sync/seconds")
    if not versions and not taken:
        return None
    said = []
    falls = sum(after <= before for before, after in pairwise(versions))
    if falls:
        said.append(f"The synced version did not rise {falls} times.")
    if len(taken) >= 3 and max(taken) > max(SLOW * median(taken), 1.0):
        said.append(f"A weight sync took {max(taken):.3g} s, the median one {median(taken):.2g} s.")
    return " ".join(said)


def _nulls(records: Records) -> str | None:
    """Metrics of the gap that were not finite, or that found nothing to measure."""
    bad: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if value is None and name.startswith("logprob_diff/"):
                bad[name] = bad.get(name, 0) + 1
    if not any(name.startswith("logprob_diff/") for record in records for name in record):
        return None
    shown = ", ".join(f"{name} ({count} steps)" for name, count in sorted(bad.items())[:4])
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"Not finite, or with nothing to measure: {shown}{more}." if bad else ""
