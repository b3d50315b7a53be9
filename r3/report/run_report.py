"""One self-contained HTML page, or one PNG, from a run folder. `docs/reference/report.md` says how to read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r3.diagnostics.run_folder import DETAILS_FILE, METRICS_FILE, SETTINGS_FILE, read_metrics
from r3.diagnostics.run_reader import Run, read_run
from r3.errors import DiagnosticsError
from r3.report import charts, page, panels
from r3.report.body import Body
from r3.report.cells import COLUMNS, LAYER_PREFIX, layer_shares, scientific
from r3.report.narrative import in_words, paired, percent_down
from r3.report.panels import CurvePanel
from r3.report.routing_panels import load_panels, routing_panels
from r3.report.run_checks import checks
from r3.report.series import Records, known, mean, recorded, steps_of, weighted_mean
from r3.report.token_panels import token_panels, worst_table

REPORT_FILE = "report.html"
MOST_ROWS = 200


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page loads nothing from elsewhere and reads in light and dark. It names what the run did not record, and what
    cannot be read of its files, and shows the rest; a run of one step, or none yet, makes a page too. Raises
    `DiagnosticsError` if there is no such folder, or none of a run's files in it.
    """
    run = read_folder(run_folder)
    target = Path(run_folder) / REPORT_FILE
    with charts.styled():
        content = page.document(f"r3: {_name(run_folder)}", _Report(run, _name(run_folder)).html())
    target.write_text(content, encoding="utf-8", errors="replace")
    return target


def write_figure(run_folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write a PNG with two panels, the gap live and replayed on a log scale and the reward, and return its path.

    Raises `DiagnosticsError` if there are no metrics to read.
    """
    records, target = read_metrics(run_folder), Path(path)
    with charts.styled(ink="#1b1f24"):
        drawn = charts.figure(9.0, 3.2)
        gap, reward = drawn.subplots(1, 2)
        charts.curves(gap, [(records, line) for line in panels.K3.lines], log=True)
        gap.set_title("k3 KL of rollout and trainer, nats per token")
        charts.curves(reward, [(records, line) for line in panels.REWARD.lines])
        reward.set_title("mean reward")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Opaque: a README is shown on light and on dark pages.
        drawn.savefig(target, format="png", dpi=160, facecolor="white")
    return target


def read_folder(run_folder: str | os.PathLike[str]) -> Run:
    """A run, whatever is wrong with it; raises `DiagnosticsError` if this is no folder of a run."""
    run, folder = read_run(run_folder), Path(run_folder)
    files = (METRICS_FILE, DETAILS_FILE, SETTINGS_FILE)
    if not any((folder / name).exists() for name in files):
        raise DiagnosticsError(f"report: expected a run folder with one of {', '.join(files)}, found none in {folder}")
    return run


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values, nested names joined by dots."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from settings_rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def thinned(records: Records) -> list[dict[str, Any]]:
    """At most `MOST_ROWS` of the steps, evenly spread, the first and the last among them."""
    if len(records) <= MOST_ROWS:
        return list(records)
    last = len(records) - 1
    places = [round(row * last / (MOST_ROWS - 1)) for row in range(MOST_ROWS)]
    return [records[place] for place in places]


def _name(run_folder: str | os.PathLike[str]) -> str:
    return Path(run_folder).resolve().name


class _Report(Body):
    """What is on the page of one run."""

    def __init__(self, run: Run, name: str):
        super().__init__(run.problems)
        self.run, self.name = run, name
        self.missing: list[str] = []

    def sections(self) -> Iterator[tuple[str, str, Callable[[], str], bool]]:
        records, details = self.run.records, self.run.details
        yield "gap", "The gap over time", lambda: page.grid(self.curves(panels.GAP)), False
        yield "tokens", "Single tokens", lambda: page.grid(token_panels(self.run, self.missing)), False
        yield "worst", "The worst tokens", lambda: worst_table(details), False
        yield "routing", "Routing, live against rollout", self.routing, False
        yield "load", "Load of experts", self.load, False
        yield "coverage", "Coverage and age of the rollouts", lambda: page.grid(self.curves(panels.COVERAGE)), False
        yield "training", "Reward and time", lambda: page.grid(self.curves(panels.TRAINING)), False
        yield "steps", "Steps", lambda: _steps_table(records), False
        yield "metrics", "All metrics", lambda: _metrics_table(records), True
        yield "settings", "Settings", lambda: _settings_table(self.run.settings), True

    def title(self) -> str:
        return self.name

    def extent(self) -> str:
        return _extent(self.run.records)

    def curves(self, shown: Sequence[CurvePanel]) -> list[str]:
        for each in shown:
            self.missing += panels.missing(each, self.run.records)
        return [panels.curve_panel(each, [("", self.run.records)]) for each in shown]

    def routing(self) -> str:
        if not any(layer_shares(record) for record in self.run.records):
            self.missing.append(f"{LAYER_PREFIX}NN")
        return page.grid([*routing_panels(self.run.records), *self.curves(panels.ROUTING)])

    def load(self) -> str:
        maps, charts_of_load = list(load_panels(self.run.details, self.missing)), self.curves(panels.LOAD)
        # Live and rollout beside each other, and a curve at the end of the row.
        rows = (maps[:2], charts_of_load[:1], maps[2:], charts_of_load[1:])
        return page.grid(part for row in rows for part in row)

    def head(self) -> str:
        records, settings = self.run.records, self.run.settings
        if not records:
            return ""
        made = checks(records, settings)
        wrong = [check.found for check in made if check.found]
        unchecked = [check.name for check in made if check.found is None]
        silent = ", ".join(check.name for check in made if check.found == "")
        looked = len(made) - len(unchecked)
        note = f"{looked} checks made, {len(wrong)} found something. These did not: {silent}."
        if not wrong:
            note = f"{looked} checks found nothing wrong: {silent}."
        if unchecked:
            note += f" Not made, for want of records: {', '.join(unchecked)}."
        return "".join(
            [
                page.cards(_cards(records)),
                page.bullets(in_words(records, settings)),
                page.warning("What looks wrong", wrong, label="What looks wrong"),
                f'<p class="soft">{page.text(note)}</p>\n',
            ]
        )

    def foot(self) -> str:
        """What was not recorded, once."""
        names = sorted(dict.fromkeys(self.missing))
        if not names or not self.run.records:
            return ""
        listed = ", ".join(f"<code>{page.text(name)}</code>" for name in names)
        return f'<p class="soft">Not recorded: {listed}.</p>\n'


def _extent(records: Records) -> str:
    steps = steps_of(records)
    if not steps:
        return "No steps are recorded yet."
    model = f"{len(steps)} step{'s' * (len(steps) > 1)}"
    span = f", {min(steps):.0f} to {max(steps):.0f}" if len(steps) > 1 else f": {steps[0]:.0f}"
    return (
        f"{model}{span}. Log-probabilities of the same sampled tokens, trainer against rollout, with the trainer's own "
        f"routing (live) and with the rollout's (replayed)."
    )


def _cards(records: Records) -> Iterator[tuple[str, str]]:
    for side in ("live", "replayed"):
        if recorded(records, f"logprob_diff/{side}/k3"):
            value, over = weighted_mean(records, f"logprob_diff/{side}/k3")
            yield scientific(value), f"k3 {side}, mean over {over}"
    both = paired(records, "k3")
    if below := mean([replayed for _, replayed in both]) if both else 0.0:
        yield f"{mean([live for live, _ in both]) / below:.2f}", "k3 live / replayed, over the steps that have both"
    for key, label in (("routing/differing_rows", "choices that differ"), ("routing/coverage", "rows with routing")):
        if found := known(records, key):
            yield percent_down(mean(found)), f"{label}, mean over steps"
    rewards = known(records, "reward/mean")
    if rewards:
        shown = max(1, len(rewards) // 3)
        ends = (f"{mean(part):.3f}" for part in (rewards[:shown], rewards[-shown:]))
        yield " → ".join(ends), f"reward, first and last {f'{shown} steps' if shown > 1 else 'step'}"


def _steps_table(records: Records) -> str:
    if not records:
        return ""
    columns = [column for column in COLUMNS if column.recorded(records)]
    shown = thinned(records)
    note = f"{len(shown)} of {len(records)} steps, evenly spread" if len(shown) < len(records) else ""
    rows = ([column.text(record) for column in columns] for record in shown)
    return page.table([column.heading for column in columns], rows, label="Steps", note=note)


def _metrics_table(records: Records) -> str:
    def row(key: str) -> list[str]:
        found = known(records, key)
        figures = (found[0], found[-1], weighted_mean(records, key)[0], min(found), max(found))
        return [key, *(f"{figure:.4g}" for figure in figures), f"{len(found)}"]

    keys = sorted({key for record in records for key in record if key != "step"})
    rows = [row(key) for key in keys if recorded(records, key)]
    headings = ("metric", "first", "last", "mean", "smallest", "largest", "steps")
    note = "Means of logprob_diff are weighted by tokens where those are recorded."
    return page.table(headings, rows, label="All metrics", note=note) if rows else ""


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = list(settings_rows(settings))
    return page.table(("setting", "value"), rows, label="Settings", words=True) if rows else ""
