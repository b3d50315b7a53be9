"""The panels of a report that show routing by layer and the load of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r3.report.cells import percent
from r3.report.charts import figure, svg
from r3.report.heat_maps import first_and_last, layer_lines, layer_map, layers_over_steps, load_map
from r3.report.page import panel
from r3.report.panels import drawn_panel
from r3.report.series import Records
from r3.report.token_views import Load, last_with, load

LEAST_TOP = 2.0
"""The scale of the loads goes at least this far, so that an even load looks even."""


def routing_panels(records: Records) -> Iterator[str]:
    """Share of differing rows by layer: at the ends of the run, and over the steps."""
    recorded = layers_over_steps(records)
    if not recorded:
        return
    _, last = recorded[-1]
    most = max(last, key=last.__getitem__)
    told = f"At the last step {percent(last[most])} in layer {most}, the most."

    def lines(axes: Any) -> str:
        layer_lines(axes, first_and_last(records))
        return told

    caption = "Rows whose set of experts differs between live routing and the rollout's."
    title = "Choices that differ, by layer"
    yield drawn_panel(title, caption, lines, name="layers", label=f"{title}. {told}")
    if len(recorded) > 1:
        title = "Choices that differ, by layer and step"
        caption = "The same over the whole run; bright is more."
        yield drawn_panel(
            title, caption, lambda axes: layer_map(axes, records), name="layer-map", label=f"{title}. {told}"
        )


def load_panels(details: Sequence[Mapping[str, Any]], missing: list[str]) -> Iterator[str]:
    """Load by layer and expert, live and in the rollout, of the first and the last details that have both."""
    found = [
        (detail, live, rollout)
        for detail in details
        if (live := load(detail, "live")) and (rollout := load(detail, "rollout"))
    ]
    if not found:
        missing.append("load (details)")
        return
    ends = [found[0], found[-1]][: len(found)]
    top = max(LEAST_TOP, *(_high(side) for _, *sides in ends for side in sides))
    for place, (detail, live, rollout) in enumerate(ends):
        for side, found_load in (("live", live), ("rollout", rollout)):
            yield _map(detail["step"], side, found_load, top, name=f"load-{place}-{side}", told=_shift(live, rollout))


def load_pair(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Iterator[str]:
    """Load in the rollout by layer and expert, of the last details of each run that has it: (name, details)."""
    found = [
        (name, detail, load(detail, "rollout")) for name, details in runs if (detail := last_with(details, _has_load))
    ]
    shown = [(name, detail["step"], table) for name, detail, table in found if table is not None]
    top = max((LEAST_TOP, *(_high(table) for _, _, table in shown)))
    for name, step, table in shown:
        yield _map(step, "rollout", table, top, name=f"load-{name}", run=f"{name}: ")


def _has_load(detail: Mapping[str, Any]) -> bool:
    return load(detail, "rollout") is not None


def _map(step: int, side: str, found: Load, top: float, *, name: str, told: str = "", run: str = "") -> str:
    drawn = figure()
    load_map(drawn.subplots(), found.loads, found.layers, most=top)
    title = f"{run}Load, {side}, step {step}"
    layer, expert, most = _busiest(found)
    caption = f"Times the layer's mean; most: {most:.1f} for expert {expert} in layer {layer}."
    if side == "rollout":
        caption = f"{caption} {told}".strip()
    return panel(title, svg(drawn, name=name, label=f"{title}. {caption}"), caption)


def _high(found: Load) -> float:
    """What all but the highest half percent of the loads are below: one expert does not darken all others."""
    ordered = sorted(load for row in found.loads for load in row)
    return ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]


def _busiest(found: Load) -> tuple[int, int, float]:
    most = max((load, -place, -expert) for place, row in enumerate(found.loads) for expert, load in enumerate(row))
    return found.layers[-most[1]], -most[2], most[0]


def _shift(live: Load, rollout: Load) -> str:
    """Where live and rollout load differ most."""
    if live.layers != rollout.layers or len(live.loads[0]) != len(rollout.loads[0]):
        return "Live and rollout have different layers or experts."
    differences = [
        (abs(a - b), a, b, layer, expert)
        for layer, ours, theirs in zip(live.layers, live.loads, rollout.loads, strict=True)
        for expert, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    _, a, b, layer, expert = max(differences)
    return f"Furthest apart: expert {expert} in layer {layer}, {a:.2f} live and {b:.2f} in the rollout."
