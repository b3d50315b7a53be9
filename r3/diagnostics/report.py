"""One self-contained HTML page, or one PNG, from a run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from r3.diagnostics import charts
from r3.diagnostics.cells import COLUMNS, LAYER_PREFIX, MISSING, layer_shares, number, scientific
from r3.diagnostics.charts import Line, Records
from r3.diagnostics.run_folder import read_metrics, read_settings

REPORT_FILE = "report.html"
REWARD_STEPS = 3

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #ffffff; --card: #f3f5f7; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4b0; --page: #14171b; --card: #1e2329; --line: #363d46; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--page); }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p, figcaption { color: var(--soft); margin: .2rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .6rem 1rem; flex: 1 1 9rem; }
.card b { display: block; font-size: 1.2rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; white-space: normal; vertical-align: bottom; }
.settings th { width: 30%; }
.settings th, .settings td { text-align: left; position: static; white-space: normal; overflow-wrap: anywhere; }
code { font-size: .9em; }
"""


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page loads nothing from elsewhere and reads in light and dark. What the run did not record is named on the page;
    a run of one step, or none yet, makes a page too. Raises `DiagnosticsError` if there are no metrics to read.
    """
    folder = Path(run_folder)
    records = read_metrics(folder)
    title = escape(folder.resolve().name)
    with charts.styled():
        sections = [*_figures(records)] if records else []
    page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>r3: {title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>Log-probabilities of the same sampled tokens, trainer against rollout, with the trainer's own routing (live) and with
the rollout's routing (replayed).</p>
{_cards(records)}
{"".join(sections)}
{_steps_table(records) if records else "<p>No steps are recorded yet.</p>"}
{_settings_table(read_settings(folder))}
</body>
</html>
"""
    target = folder / REPORT_FILE
    target.write_text(page, encoding="utf-8")
    return target


def write_figure(run_folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write a PNG with two panels, the gap live and replayed on a log scale and the reward, and return its path.

    Raises `DiagnosticsError` if there are no metrics to read.
    """
    records, target = read_metrics(run_folder), Path(path)
    with charts.styled(ink="#1b1f24"):
        drawn = charts.figure(9.0, 3.2)
        gap, reward = drawn.subplots(1, 2)
        charts.curves(gap, records, charts.K3, log=True)
        gap.set_title("k3 KL of rollout and trainer, nats per token")
        charts.curves(reward, records, charts.REWARD)
        reward.set_title("mean reward")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Opaque: a README is shown on light and on dark pages.
        drawn.savefig(target, format="png", dpi=160, facecolor="white")
    return target


def _figures(records: Records) -> Iterator[str]:
    def chart(lines: Sequence[Line], unit: str, log: bool = False) -> Callable[[], tuple[Any, int]]:
        def draw() -> tuple[Any, int]:
            drawn = charts.figure()
            axes = drawn.subplots()
            left_out = charts.curves(axes, records, lines, log=log)
            axes.set_ylabel(unit)
            return drawn, left_out

        return draw

    def sync() -> tuple[Any, int]:
        drawn = charts.figure()
        for axes, lines in zip(drawn.subplots(1, 2), (charts.SYNC_SECONDS, charts.SYNC_BYTES), strict=True):
            charts.curves(axes, records, lines)
            axes.set_ylabel(lines[0].label)
            axes.set_ylim(bottom=0)
        return drawn, 0

    yield _figure(
        records,
        "k3",
        "k3 KL, live and replayed",
        "Mean of exp(d) - 1 - d over sampled tokens, d = train - rollout log-probability.",
        charts.K3,
        chart(charts.K3, "nats per token", log=True),
    )
    yield _figure(
        records,
        "abs",
        "Absolute difference of log-probabilities",
        "Mean and largest |d| over sampled tokens.",
        charts.ABS,
        chart(charts.ABS, "nats", log=True),
    )
    yield _figure(
        records,
        "reward",
        "Reward",
        "Mean over the step's rollouts.",
        charts.REWARD,
        chart(charts.REWARD, "mean reward"),
    )
    yield _layers(records)
    both = (*charts.SYNC_SECONDS, *charts.SYNC_BYTES)
    yield _figure(records, "sync", "Weight sync", "Seconds and bytes of each complete update.", both, sync)


def _figure(
    records: Records,
    name: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    draw: Callable[[], tuple[Any, int]],
) -> str:
    missing = [line.key for line in lines if all(math.isnan(number(record, line.key)) for record in records)]
    notes = [caption]
    picture = ""
    if len(missing) < len(lines):
        drawn, left_out = draw()
        picture = charts.svg(drawn, name=name, label=title)
        if left_out:
            notes.append(f"Left out of the log scale, not being above zero: {left_out}.")
    note = " ".join(notes) + (f" {_not_recorded(missing)}" if missing else "")
    return f"<section><h2>{title}</h2><figure>{picture}<figcaption>{note}</figcaption></figure></section>\n"


def _layers(records: Records) -> str:
    title = "Rows routed differently, by layer"
    recorded = [record for record in records if layer_shares(record)]
    if not recorded:
        return f"<section><h2>{title}</h2><p>{_not_recorded([LAYER_PREFIX + 'NN'])}</p></section>\n"
    drawn = charts.figure()
    if len(recorded) == 1:
        charts.layer_lines(drawn.subplots(), records)
    else:
        left, right = drawn.subplots(1, 2)
        charts.layer_lines(left, records)
        charts.layer_map(right, records)
    caption = "Share of tokens whose set of experts differs between live routing and the rollout's."
    picture = charts.svg(drawn, name="layers", label=title)
    return f"<section><h2>{title}</h2><figure>{picture}<figcaption>{caption}</figcaption></figure></section>\n"


def _not_recorded(keys: Sequence[str]) -> str:
    return "Not recorded: " + ", ".join(f"<code>{escape(key)}</code>" for key in keys) + "."


def _cards(records: Records) -> str:
    live, replayed = (_mean(records, f"logprob_diff/{side}/k3") for side in ("live", "replayed"))
    paired = [r for r in records if not any(math.isnan(number(r, line.key)) for line in charts.K3)]
    above, below = (_mean(paired, line.key)[0] for line in charts.K3)
    ratio = f"{above / below:.2f}" if below > 0 else MISSING
    rewards = [value for record in records if not math.isnan(value := number(record, "reward/mean"))]
    shown = min(REWARD_STEPS, len(rewards))
    ends = (f"{sum(part) / shown:.3f}" for part in (rewards[:shown], rewards[-shown:])) if shown else ()
    steps = charts.steps_of(records)
    cards = [
        (_or_missing(live[0]), f"k3 live, mean over {live[1]}"),
        (_or_missing(replayed[0]), f"k3 replayed, mean over {replayed[1]}"),
        (ratio, "k3 live / replayed, over the steps that have both"),
        (" → ".join(ends) or MISSING, f"reward, first and last {shown} steps" if shown else "reward"),
        (str(len(records)), f"steps, {min(steps):.0f} to {max(steps):.0f}" if steps else "steps"),
    ]
    inner = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return f'<div class="cards">{inner}</div>'


def _mean(records: Records, key: str) -> tuple[float, str]:
    """Mean of a metric over the run, weighted by tokens where every step says how many it had, and what it is over."""
    count_key = key.rsplit("/", 1)[0] + "/tokens"
    found = [(value, number(r, count_key)) for r in records if not math.isnan(value := number(r, key))]
    tokens = math.fsum(count for _, count in found) if found else math.nan
    if tokens > 0:
        return math.fsum(value * count for value, count in found) / tokens, "tokens"
    return (math.fsum(value for value, _ in found) / len(found) if found else math.nan), "steps"


def _or_missing(value: float) -> str:
    return MISSING if math.isnan(value) else scientific(value)


def _steps_table(records: Records) -> str:
    columns = [column for column in COLUMNS if column.recorded(records)]
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c.text(r))}</td>" for c in columns) + "</tr>\n" for r in records)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>Steps</h2><div class="scroll" tabindex="0">{table}</div></section>\n'


def _settings_table(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "<section><h2>Settings</h2><p>Not recorded.</p></section>\n"
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>\n" for key, value in _flat(settings))
    return f'<section><h2>Settings</h2><div class="scroll"><table class="settings">{rows}</table></div></section>\n'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
