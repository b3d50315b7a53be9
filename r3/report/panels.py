"""The charts of a report: which metrics each shows, how, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r3.report import charts
from r3.report.charts import FOURTH, LIVE, REPLAYED, THIRD, Line
from r3.report.page import panel
from r3.report.series import Records, recorded, steps_of, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def _sides(
    metric: str, label: str = "", *, largest: bool = False, dash: str = "-", markers: str = "os"
) -> tuple[Line, Line]:
    return (
        Line(f"logprob_diff/live/{metric}", f"live{label}", LIVE, markers[0], dash, largest=largest),
        Line(f"logprob_diff/replayed/{metric}", f"replayed{label}", REPLAYED, markers[1], dash, largest=largest),
    )


K3 = CurvePanel(
    name="k3",
    title="k3 KL, live and replayed",
    unit="nats per token",
    caption="Mean of exp(d) - 1 - d over sampled tokens; d is the train less the rollout log-probability.",
    lines=_sides("k3"),
    log=True,
)
GAP = (
    K3,
    CurvePanel(
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
    ),
    CurvePanel(
        name="extreme",
        title="Extreme tokens",
        unit="share of tokens",
        caption="Tokens whose importance ratio exp(d) leaves the bounds, 1/2 to 2 unless set otherwise.",
        lines=_sides("extreme_frac"),
        share=True,
        from_zero=True,
    ),
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
LOAD = (
    CurvePanel(
        name="load-max",
        title="Most loaded expert",
        unit="times the mean load",
        caption="Load of the busiest expert over the mean of its layer; the largest of all layers.",
        lines=(
            Line("routing/load_max/live", "live", LIVE, "o", "--"),
            Line("routing/load_max/rollout", "rollout", THIRD, "D"),
        ),
    ),
    CurvePanel(
        name="load-shift",
        title="Load that moved",
        unit="share of the load",
        caption="How much of the load sits on other experts live than in the rollout; mean over layers.",
        lines=(Line("routing/load_shift", "shift", FOURTH, "^"),),
        share=True,
        from_zero=True,
    ),
)
COVERAGE = (
    CurvePanel(
        name="coverage",
        title="Coverage",
        unit="rows with routing",
        caption="Rows whose routing was captured; the others are routed live.",
        lines=(Line("routing/coverage", "coverage", REPLAYED, "s"),),
        share=True,
    ),
    CurvePanel(
        name="lag",
        title="Version lag",
        unit="weight versions",
        caption="How many syncs the trainer was ahead of the weights that made a row.",
        lines=(
            Line("routing/version_lag_max", "largest", FOURTH, "^", "--", largest=True),
            Line("routing/version_lag_mean", "mean", REPLAYED, "s"),
        ),
        from_zero=True,
    ),
    CurvePanel(
        name="margin",
        title="Margin at the top-k boundary",
        unit="router score",
        caption="Median distance from the last chosen to the first unchosen expert, by whether the choice differs.",
        lines=(
            Line("routing/margin/agreeing_p50", "same choice", REPLAYED, "s"),
            Line("routing/margin/differing_p50", "differs", LIVE, "o", "--"),
        ),
        log=True,
    ),
)
TRAINING = (
    CurvePanel(
        name="reward",
        title="Reward",
        unit="mean reward",
        caption="Mean over the step's rollouts.",
        lines=(Line("reward/mean", "mean reward", THIRD),),
    ),
    CurvePanel(
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
    ),
    CurvePanel(
        name="sync",
        title="Weight sync",
        unit="seconds",
        caption="Duration of each complete update, from its begin to its commit.",
        lines=(Line("sync/seconds", "seconds", FOURTH, "^"),),
        from_zero=True,
    ),
)


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
