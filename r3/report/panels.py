"""The charts of a report over the steps: those that metrics declare, and those that show several metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from r3.diagnostics.metric import Metric
from r3.diagnostics.registry import GROUPS, Group, declared
from r3.report import charts
from r3.report.charts import FOURTH, LIVE, REPLAYED, THIRD, Line
from r3.report.page import panel
from r3.report.series import Records, recorded, steps_of, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_Style = tuple[str, str, str]
"""Colour, marker and dash of a curve."""
_ALONE: dict[str, _Style] = {
    "live": (LIVE, "o", "-"),
    "replayed": (REPLAYED, "s", "-"),
    "third": (THIRD, "o", "-"),
    "fourth": (FOURTH, "^", "-"),
}
_TOGETHER: dict[tuple[str, ...], list[_Style]] = {
    ("live", "replayed"): [(LIVE, "o", "-"), (REPLAYED, "s", "-")],
    ("live", "rollout"): [(LIVE, "o", "--"), (THIRD, "D", "-")],
}
_OTHERS: list[_Style] = [(REPLAYED, "s", "-"), (LIVE, "o", "--"), (THIRD, "D", "-."), (FOURTH, "^", ":")]


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """One chart of curves over the steps. `title` and `caption` are HTML without anything from a run."""

    name: str
    title: str
    unit: str
    caption: str
    lines: tuple[Line, ...]
    log: bool = False
    share: bool = False
    from_zero: bool = False


def chart_of(metric: Metric, keys: Sequence[str]) -> CurvePanel:
    """The panel that a metric declares, with a curve for each of its keys."""
    chart = metric.chart
    assert chart is not None
    labels = _told_apart(keys)
    styles = [_ALONE[chart.colour]] if len(keys) == 1 else _TOGETHER.get(labels, _OTHERS)
    if len(keys) == 1:
        labels = (chart.label or keys[0].rpartition("/")[2].replace("_", " "),)
    lines = tuple(Line(key, label, *style) for key, label, style in zip(keys, labels, cycle(styles), strict=False))
    return CurvePanel(
        name=re.sub(r"[/_]+", "-", metric.name.partition("{")[0]).strip("-"),
        title=chart.title,
        unit=chart.unit or metric.unit,
        caption=chart.caption,
        lines=lines,
        log=chart.log,
        share=chart.share,
        from_zero=chart.from_zero,
    )


def _told_apart(keys: Sequence[str]) -> tuple[str, ...]:
    """The parts in which each key differs from the others."""
    differing = [parts for parts in zip(*(key.split("/") for key in keys), strict=False) if len(set(parts)) > 1]
    return tuple(" ".join(parts).replace("_", " ") for parts in zip(*differing, strict=True))


def chart_with(key: str) -> CurvePanel:
    """The panel of the metric that is recorded as `key`."""
    return next(chart_of(metric, keys) for metric, keys in declared() if key in keys)


def section(name: str, *first: CurvePanel, groups: Sequence[Group] = GROUPS) -> tuple[CurvePanel, ...]:
    """The panels of a section of the page: `first`, then the others that metrics declare for it."""
    shown = [(metric, keys) for metric, keys in declared(groups) if metric.chart and metric.chart.section == name]
    found = [chart_of(metric, keys) for metric, keys in shown]
    return (*first, *(panel for panel in found if panel not in first))


def _sides(
    metric: str, label: str, *, largest: bool = False, dash: str = "-", markers: str = "os"
) -> tuple[Line, Line]:
    return (
        Line(f"logprob_diff/live/{metric}", f"live{label}", LIVE, markers[0], dash, largest=largest),
        Line(f"logprob_diff/replayed/{metric}", f"replayed{label}", REPLAYED, markers[1], dash, largest=largest),
    )


K3 = chart_with("logprob_diff/live/k3")
SIZE_OF_D = CurvePanel(
    name="abs",
    title="Size of d",
    unit="nats",
    caption="Mean, 99th percentile and largest |d| over sampled tokens.",
    lines=(
        *_sides("abs_max", ", largest", largest=True, dash=":", markers="^v"),
        *_sides("abs_p99", ", p99", dash="--", markers="+x"),
        *_sides("abs_mean", ", mean"),
    ),
    log=True,
)
DIFFERING = CurvePanel(
    name="differing",
    title="Choices that differ, over the steps",
    unit="share",
    caption="Of all choices, one for each token and layer; and of tokens, in at least one layer.",
    lines=(
        Line("routing/differing_tokens", "tokens", FOURTH, "^", "--"),
        Line("routing/differing_rows", "choices", REPLAYED, "s"),
    ),
    share=True,
    from_zero=True,
)
LAG = CurvePanel(
    name="lag",
    title="Version lag",
    unit="weight versions",
    caption="How many syncs the trainer was ahead of the weights that made a row.",
    lines=(
        Line("routing/version_lag_max", "largest", FOURTH, "^", "--", largest=True),
        Line("routing/version_lag_mean", "mean", REPLAYED, "s"),
    ),
    from_zero=True,
)
MARGIN = CurvePanel(
    name="margin",
    title="Margin at the top-k boundary",
    unit="router score",
    caption="Median distance from the last chosen to the first unchosen expert, by whether the choice differs.",
    lines=(
        Line("routing/margin/agreeing_p50", "same choice", REPLAYED, "s"),
        Line("routing/margin/differing_p50", "differs", LIVE, "o", "--"),
    ),
    log=True,
)
TIMES = CurvePanel(
    name="times",
    title="Where a step's time goes",
    unit="seconds",
    caption="Each phase of a step; live against replayed is measured at some steps only.",
    lines=(
        Line("time/rollout_s", "rollout", THIRD, "D"),
        Line("time/measure_s", "measure", LIVE, "o", "-."),
        Line("time/train_s", "train", REPLAYED, "s", "--"),
        Line("time/sync_s", "sync", FOURTH, "^", ":"),
    ),
    from_zero=True,
)
REWARD = chart_with("reward/mean")
GAP = section("gap", K3, SIZE_OF_D)
ROUTING = section("routing", DIFFERING)
LOAD = section("load")
COVERAGE = section("coverage", chart_with("routing/coverage"), LAG, MARGIN)
TRAINING = section("training", REWARD, TIMES)


def missing(shown: CurvePanel, records: Records) -> list[str]:
    """The keys of its lines that no step recorded."""
    return [line.key for line in shown.lines if not recorded(records, line.key)]


def curve_panel(shown: CurvePanel, runs: Sequence[tuple[str, Records]], *, name: str | None = None) -> str:
    """The chart of one run, or of several, told apart by the labels of their lines; empty if nothing is recorded."""
    found = [(records, line) for _, records in runs for line in shown.lines if recorded(records, line.key)]
    return line_panel(shown, found, name=name or shown.name) if found else ""


def line_panel(shown: CurvePanel, found: Sequence[tuple[Records, Line]], *, name: str, title: str | None = None) -> str:
    """A chart like `shown`, of other lines."""

    def draw(axes: Axes) -> str:
        note = charts.curves(axes, found, log=shown.log)
        if shown.share:
            charts.percentages(axes.yaxis)
            low, high = axes.get_ylim()
            if high > 1.0 >= axes.dataLim.y1:
                axes.set_ylim(top=1.0 + 0.02 * max(1.0 - low, 1e-4))
        if shown.from_zero and axes.lines:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(shown.unit)
        return note

    title = title or shown.title
    told = "; ".join(_told(records, line) for records, line in found)
    return drawn_panel(title, shown.caption, draw, name=name, label=f"{title}, {shown.unit}, over the steps. {told}.")


def drawn_panel(title: str, caption: str, draw: Callable[[Axes], str], *, name: str, label: str) -> str:
    """A chart with one pair of axes; `draw` returns what is to be added to the caption."""
    drawn = charts.figure()
    note = draw(drawn.subplots())
    picture = charts.svg(drawn, name=name, label=label)
    return panel(title, picture, f"{caption} {note}".strip())


def _told(records: Records, line: Line) -> str:
    """A curve's ends, for those who hear the page."""
    points = zip(steps_of(records), values(records, line.key), strict=True)
    points = [(step, value * line.factor) for step, value in points if not math.isnan(value)]
    ends = dict((points[0], points[-1]))
    return f"{line.label}: " + ", ".join(f"{value:.3g} at step {step:.0f}" for step, value in ends.items())
