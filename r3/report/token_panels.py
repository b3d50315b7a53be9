"""The panels and the table of a report that show single tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r3.diagnostics.run_reader import Run
from r3.report.narrative import extreme_ratio
from r3.report.page import raw_table, sampled_text, text
from r3.report.panels import drawn_panel
from r3.report.token_charts import COLOUR, DASH, Outlined, diff_histogram, lowest_of, scatter
from r3.report.token_views import SIDES, WorstToken, histogram, last_with, pairs, tokens_seen, worst_tokens

MOST_LAYERS = 12


def token_panels(run: Run, missing: list[str]) -> Iterator[str]:
    """Rollout against train log-probability, by side, and the histogram of d, at the last step that has details."""
    ratio = extreme_ratio(run.settings)
    detail = last_pairs(run.details)
    if detail is None:
        missing.append("tokens (details)")
    else:
        lowest = lowest_shown([detail])
        for side in SIDES:
            yield scatter_panel(detail, side, lowest=lowest, ratio=ratio, name=f"scatter-{side}")
    detail = last_histogram(run.details)
    if detail is None:
        missing.append("histogram (details)")
        return
    sides = [outlined(detail, side, label=side, colour=COLOUR[side], dash=DASH[side]) for side in SIDES]
    title = f"Histogram of d, step {detail['step']}"
    yield histogram_panel([each for each in sides if each.bins], title=title, ratio=ratio, name="histogram")


def last_pairs(details: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last of `details` with tokens to scatter."""
    return last_with(details, lambda detail: any(pairs(detail, side)[0] for side in SIDES))


def last_histogram(details: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return last_with(details, lambda detail: any(histogram(detail, side) for side in SIDES))


def lowest_shown(details: Sequence[Mapping[str, Any]]) -> float:
    """Where the axes of scatter charts of these details start, the same for all."""
    columns = [column for detail in details for side in SIDES for column in pairs(detail, side)]
    worst = [token for detail in details for token in worst_tokens(detail)]
    known = [value for token in worst for value in (token.rollout, token.live, token.replayed) if not math.isnan(value)]
    return lowest_of(known, *columns)


def scatter_panel(
    detail: Mapping[str, Any], side: str, *, lowest: float, ratio: float, name: str, run: str = ""
) -> str:
    """Train over rollout log-probability of one side; empty if that is not recorded. `run` goes before the title."""
    rollout, train = pairs(detail, side)
    if not rollout:
        return ""
    worst = [token for token in worst_tokens(detail) if not math.isnan(getattr(token, side))]

    def draw(axes: Any) -> str:
        scatter(axes, rollout, train, side, worst=worst, lowest=lowest, ratio=ratio)
        return ""

    beyond = sum(abs(b - a) > math.log(ratio) for a, b in zip(rollout, train, strict=True))
    seen = tokens_seen(detail)
    title = f"{run}Rollout against train, {side}, step {detail['step']}"
    caption = (
        f"{len(rollout):,}{f' of {seen:,}' if seen else ''} tokens, drawn evenly, {beyond} of them outside the "
        f"dotted lines (ratio 1/{ratio:g} and {ratio:g}); crosses: those, and the worst tokens of the step."
    )
    return drawn_panel(title, caption, draw, name=name, label=f"{title}. {caption}")


def outlined(detail: Mapping[str, Any], side: str, *, label: str, colour: str, dash: str) -> Outlined:
    """The histogram of one side, without bins if it is not recorded."""
    marks = [d for token in worst_tokens(detail) if not math.isnan(d := token.diff(side))]
    return Outlined(label=label, bins=histogram(detail, side), marks=marks, colour=colour, dash=dash)


def histogram_panel(found: Sequence[Outlined], *, title: str, ratio: float, name: str) -> str:
    """Histograms of d over each other; there is at least one, and each has bins."""

    def draw(axes: Any) -> str:
        diff_histogram(axes, found, ratio=ratio)
        return ""

    total = " and ".join(dict.fromkeys(f"{sum(count for _, _, count in each.bins):,}" for each in found))
    caption = (
        f"{total} tokens, logarithmic both ways; dotted: ratio 1/{ratio:g} and {ratio:g}; crosses: the worst tokens."
    )
    told = "; ".join(f"{each.label}: {_beyond(each.bins, ratio):,} tokens wholly outside the bounds" for each in found)
    return drawn_panel(title, caption, draw, name=name, label=f"{title}. {told}.")


def _beyond(bins: Sequence[tuple[float, float, int]], ratio: float) -> int:
    bound = math.log(ratio)
    return sum(count for lower, upper, count in bins if lower >= bound or upper <= -bound)


def worst_table(details: Sequence[Mapping[str, Any]]) -> str:
    """The worst tokens of the last details that have any: text in context, probabilities, layers."""
    detail = last_with(details, worst_tokens)
    if detail is None:
        return ""
    tokens = worst_tokens(detail)
    sides = [side for side in SIDES if any(not math.isnan(getattr(token, side)) for token in tokens)]
    layers = any(token.layers is not None for token in tokens)
    headings = [
        "sample, position",
        "text",
        "p rollout",
        *(f"p {side}" for side in sides),
        *(f"d {side}, nats" for side in sides),
        *(["layers that parted"] if layers else []),
    ]
    by = "replayed" if "replayed" in sides else "live"
    note = (
        f"Step {detail['step']}: the {len(tokens)} tokens with the largest |d|, {by}; p is the probability of the "
        f"token that stands in a frame, under each side. ↵ is a line break, ⇥ a tab."
    )
    rows = (_row(token, sides, layers) for token in tokens)
    return raw_table(headings, rows, label="The worst tokens", kind="tokens", note=note)


def _row(token: WorstToken, sides: Sequence[str], layers: bool) -> str:
    place = ", ".join("?" if part is None else str(part) for part in (token.sample, token.position))
    cells = [_probability(token.rollout), *(_probability(getattr(token, side)) for side in sides)]
    cells += ["-" if math.isnan(token.diff(side)) else f"{token.diff(side):+.3f}" for side in sides]
    words = (
        f"<bdi>{sampled_text(token.before)}</bdi><mark><bdi>{sampled_text(token.token)}</bdi></mark>"
        f"<bdi>{sampled_text(token.after)}</bdi>"
    )
    last = f'<td class="layers">{text(_layers(token.layers))}</td>' if layers else ""
    numbers = "".join(f"<td>{text(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{text(place)}</th><td class="text">{words}</td>{numbers}{last}</tr>\n'


def _probability(logprob: float) -> str:
    if math.isnan(logprob):
        return "-"
    # A logprob above 0 is no probability: shown as it is, for it says that something is broken.
    return f"{math.exp(min(logprob, 700.0)):.3g}"


def _layers(layers: Sequence[int] | None) -> str:
    if layers is None:
        return "?"
    if not layers:
        return "none"
    shown = ", ".join(map(str, layers[:MOST_LAYERS]))
    return f"{shown} and {len(layers) - MOST_LAYERS} more" if len(layers) > MOST_LAYERS else shown
