"""One self-contained HTML page that sets two runs side by side. `docs/reference/report.md` says how to read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r3.diagnostics.run_reader import Run
from r3.report import charts, page, panels
from r3.report.body import Body
from r3.report.cells import scientific
from r3.report.charts import FOURTH, THIRD, Line
from r3.report.heat_maps import layer_lines, layer_map
from r3.report.narrative import diff_key, extreme_ratio, layer_means, percent_down, share_text, times
from r3.report.panels import CurvePanel, drawn_panel, line_panel
from r3.report.routing_panels import load_pair
from r3.report.run_checks import checks
from r3.report.run_report import read_folder, settings_rows
from r3.report.series import Records, known, recorded, steps_of, weighted_mean
from r3.report.token_panels import (
    histogram_panel,
    last_histogram,
    last_pairs,
    lowest_shown,
    outlined,
    scatter_panel,
    worst_table,
)
from r3.report.token_views import SIDES

COMPARISON_FILE = "comparison.html"
NOT_SET = "(not set)"

_HEADLINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("logprob_diff/replayed/k3", "k3 with replayed routing", scientific),
    ("logprob_diff/live/k3", "k3 with live routing", scientific),
    ("logprob_diff/replayed/extreme_frac", "The share of extreme tokens, replayed,", share_text),
    ("logprob_diff/live/extreme_frac", "The share of extreme tokens, live,", share_text),
    ("routing/differing_rows", "The share of choices that differ", percent_down),
    ("routing/coverage", "The share of rows with routing", percent_down),
    ("reward/mean", "The reward", "{:.3f}".format),
    ("time/rollout_s", "A rollout, in seconds,", "{:.3g}".format),
    ("time/train_s", "The training of a step, in seconds,", "{:.3g}".format),
    ("sync/seconds", "A weight sync, in seconds,", "{:.3g}".format),
)
_MEAN_SIZE = replace(
    panels.SIZE_OF_D,
    title="Mean size of d",
    caption="Mean |d| over sampled tokens.",
    lines=tuple(line for line in panels.SIZE_OF_D.lines if line.key.endswith("/abs_mean")),
)


@dataclass(frozen=True)
class _Side:
    """One of the two runs, and how it is drawn."""

    letter: str
    path: Path
    run: Run
    colour: str
    marker: str
    dash: str

    @property
    def records(self) -> Records:
        return self.run.records

    def line(self, line: Line) -> Line:
        """The same metric, drawn as this run's."""
        return replace(line, label=self.letter, colour=self.colour, marker=self.marker, dash=self.dash)


def write_comparison(
    a: str | os.PathLike[str], b: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write a page on two run folders and return its path, by default `comparison.html` in the folder `b`.

    The page loads nothing from elsewhere. What one run has and the other has not is shown for the one; what cannot be
    read is named. Raises `DiagnosticsError` if one of the two is no run folder.
    """
    sides = (
        _Side("A", Path(a), read_folder(a), THIRD, "o", "-"),
        _Side("B", Path(b), read_folder(b), FOURTH, "s", "--"),
    )
    target = Path(b) / COMPARISON_FILE if path is None else Path(path)
    with charts.styled():
        content = page.document("r3: two runs", _Comparison(sides).html())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8", errors="replace")
    return target


class _Comparison(Body):
    def __init__(self, sides: Sequence[_Side]):
        super().__init__([f"{side.letter}: {problem}" for side in sides for problem in side.run.problems])
        self.sides = sides

    def sections(self) -> Iterator[tuple[str, str, Callable[[], str], bool]]:
        yield "gap", "The gap over time", self.gap, False
        yield "tokens", "Single tokens", self.tokens, False
        yield "routing", "Routing, live against rollout", self.routing, False
        yield "load", "Load of experts, in the rollout", self.load, False
        yield "coverage", "Coverage and age of the rollouts", lambda: self.charts(panels.COVERAGE), False
        yield "training", "Reward and time", lambda: self.charts(panels.TRAINING), False
        yield "settings", "Settings that differ", self.settings, False
        yield "metrics", "Metrics", self.metrics, False
        for side in self.sides:
            title = f"The worst tokens of {side.letter}"
            yield f"worst-{side.letter}", title, lambda side=side: worst_table(side.run.details), True

    def title(self) -> str:
        names = [_name(side, self.sides) for side in self.sides]
        return f"A: {names[0]}, B: {names[1]}"

    def extent(self) -> str:
        found = []
        for side in self.sides:
            steps = steps_of(side.records)
            span = f"{len(steps)} steps, {min(steps):.0f} to {max(steps):.0f}" if steps else "no steps yet"
            found.append(f"{side.letter}: {span}")
        return f"{'. '.join(found)}. A is drawn with circles and solid lines, B with squares and dashed ones."

    def head(self) -> str:
        found = [page.bullets(list(self.words()))]
        for side in self.sides:
            wrong = [check.found for check in checks(side.records, side.run.settings) if check.found]
            found.append(
                page.warning(f"What looks wrong in {side.letter}", wrong, label=f"What looks wrong in {side.letter}")
            )
        return "".join(found)

    def words(self) -> Iterator[str]:
        """Headline metrics of both runs, and how they compare."""
        for key, what, form in _HEADLINES:
            if all(recorded(side.records, key) for side in self.sides):
                (a, over), (b, _) = (weighted_mean(side.records, key) for side in self.sides)
                sentence = f"{what} is {form(a)} in A and {form(b)} in B, mean over {over}"
                if min(a, b) >= 0 and a != b:
                    sentence += f": {times(a, b, more='larger in B', less='smaller in B')}"
                yield f"{sentence}."
        only = {side.letter: [key for key, _, _ in _HEADLINES if recorded(side.records, key)] for side in self.sides}
        for letter, other in (("A", "B"), ("B", "A")):
            if alone := [key for key in only[letter] if key not in only[other]]:
                yield f"Only {letter} has {', '.join(alone)}."

    def gap(self) -> str:
        shown = [_MEAN_SIZE if each is panels.SIZE_OF_D else each for each in panels.GAP]
        return page.grid(
            self.chart(each, line, f"{each.title.removesuffix(', live and replayed')}, {side}")
            for side in reversed(SIDES)
            for each in shown
            for line in each.lines
            if line.key.startswith(diff_key(side, ""))
        )

    def charts(self, shown: Sequence[CurvePanel]) -> str:
        return page.grid(self.chart(each, line) for each in shown for line in each.lines)

    def chart(self, shown: CurvePanel, line: Line, title: str | None = None) -> str:
        """One metric of both runs over each other; empty if neither has it."""
        found = [
            (
                side.records,
                side.line(line),
            )
            for side in self.sides
            if recorded(side.records, line.key)
        ]
        if title is None:
            title = shown.title if len(shown.lines) == 1 else f"{shown.title}: {line.label}"
        return line_panel(shown, found, name=line.key.replace("/", "-"), title=title) if found else ""

    def tokens(self) -> str:
        details = [(side, last_pairs(side.run.details)) for side in self.sides]
        lowest = lowest_shown([detail for _, detail in details if detail is not None])
        histograms = [(side, last_histogram(side.run.details)) for side in self.sides]
        parts = []
        for name in reversed(SIDES):
            for side, detail in details:
                if detail is not None:
                    ratio = extreme_ratio(side.run.settings)
                    place = f"scatter-{side.letter}-{name}"
                    parts.append(
                        scatter_panel(detail, name, lowest=lowest, ratio=ratio, name=place, run=f"{side.letter}: ")
                    )
            found = [
                outlined(detail, name, label=side.letter, colour=side.colour, dash=side.dash)
                for side, detail in histograms
                if detail is not None
            ]
            if found := [each for each in found if each.bins]:
                ratio = extreme_ratio(self.sides[0].run.settings)
                title = f"Histogram of d, {name}, last details"
                parts.append(histogram_panel(found, title=title, ratio=ratio, name=f"histogram-{name}"))
        return page.grid(parts)

    def routing(self) -> str:
        means = [(side, shares) for side in self.sides if (shares := layer_means(side.records))]
        parts = []
        if means:
            title = "Choices that differ, by layer"
            most = max(share for _, shares in means for share in shares.values())

            def lines(axes: Any) -> str:
                layer_lines(axes, [(side.letter, shares, side.colour) for side, shares in means])
                return ""

            parts.append(drawn_panel(title, "Mean over the steps.", lines, name="layers", label=f"{title}, A and B."))
            for side, _ in means:
                title = f"{side.letter}: Choices that differ, by layer and step"

                def over(axes: Any, side: _Side = side) -> str:
                    return layer_map(axes, side.records, most=most)

                caption = "The scale is that of both runs' layers, mean over steps."
                parts.append(drawn_panel(title, caption, over, name=f"layer-map-{side.letter}", label=f"{title}."))
        shown = panels.DIFFERING
        parts += [self.chart(shown, line, f"{line.label.capitalize()} that differ") for line in shown.lines]
        parts += [self.chart(each, line) for each in panels.ROUTING if each is not shown for line in each.lines]
        return page.grid(parts)

    def load(self) -> str:
        maps = load_pair([(side.letter, side.run.details) for side in self.sides])
        return page.grid([*maps, *(self.chart(each, each.lines[-1]) for each in panels.LOAD)])

    def settings(self) -> str:
        found = [dict(settings_rows(side.run.settings)) for side in self.sides]
        keys = dict.fromkeys(key for settings in found for key in settings)
        values = [(key, *(settings.get(key, NOT_SET) for settings in found)) for key in keys]
        rows = [row for row in values if row[1] != row[2]]
        if not rows:
            return "<p>None.</p>\n" if all(found) else ""
        return page.table(("setting", "A", "B"), rows, label="Settings that differ", words=True)

    def metrics(self) -> str:
        keys = sorted({key for side in self.sides for record in side.records for key in record if key != "step"})
        rows = [self._metric(key) for key in keys if any(recorded(side.records, key) for side in self.sides)]
        headings = ("metric", "A first", "A last", "A mean", "B first", "B last", "B mean", "mean B / A")
        note = "Means of logprob_diff are weighted by tokens where those are recorded."
        return page.table(headings, rows, label="Metrics of both runs", note=note) if rows else ""

    def _metric(self, key: str) -> list[str]:
        cells, means = [key], []
        for side in self.sides:
            found = known(side.records, key)
            means.append(weighted_mean(side.records, key)[0])
            cells += [f"{value:.4g}" for value in (found[0], found[-1], means[-1])] if found else ["-"] * 3
        a, b = means
        return [*cells, f"{b / a:.3g}" if a > 0 and b >= 0 else "-"]


def _name(side: _Side, sides: Sequence[_Side]) -> str:
    """The folder's name, with its parent's where the two have the same."""
    parts = side.path.resolve().parts
    same = len({other.path.resolve().name for other in sides}) < len(sides)
    return "/".join(parts[-2:]) if same else parts[-1]
