"""Charts of single tokens: rollout against train, and the histogram of their difference d."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r3.report.charts import FOURTH, GREY, LIVE, REPLAYED, legend, power_text, power_ticks
from r3.report.token_views import Bins, WorstToken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR = {"live": LIVE, "replayed": REPLAYED}
MARKER = {"live": "o", "replayed": "s"}
DASH = {"live": "--", "replayed": "-"}
MOST_POINTS = 1024
DECADES = 4
"""How many powers of ten of |d| the histogram's axis spreads out; below, it is linear."""


def scatter(
    axes: Axes,
    rollout: Sequence[float],
    train: Sequence[float],
    side: str,
    *,
    worst: Sequence[WorstToken],
    lowest: float,
    ratio: float,
) -> None:
    """Train over rollout log-probability, from `lowest` to 0; the worst, and those outside `ratio` stand out."""
    bound = math.log(ratio)
    outside = [abs(b - a) > bound for a, b in zip(rollout, train, strict=True)]
    inside = [place for place, out in enumerate(outside) if not out][:MOST_POINTS]
    beyond = [place for place, out in enumerate(outside) if out]
    axes.plot([lowest, 0], [lowest, 0], "-", color=GREY, linewidth=0.8)
    for offset in (-bound, bound):
        axes.plot([lowest, 0], [lowest + offset, offset], ":", color=GREY, linewidth=1)
    points = {"linestyle": "", "markeredgewidth": 0, "color": COLOUR[side]}
    axes.plot(
        [rollout[i] for i in inside],
        [train[i] for i in inside],
        marker=MARKER[side],
        markersize=2.4,
        alpha=0.4,
        **points,
    )
    x = [rollout[i] for i in beyond] + [token.rollout for token in worst]
    y = [train[i] for i in beyond] + [getattr(token, side) for token in worst]
    axes.plot(x, y, linestyle="", marker="x", markersize=5, markeredgewidth=1.3, color=FOURTH)
    axes.set_xlim(lowest, -0.02 * lowest)
    axes.set_ylim(lowest, -0.02 * lowest)
    axes.set_xlabel("rollout log-probability, nats")
    axes.set_ylabel(f"train, {side} routing, nats")


def lowest_of(*columns: Sequence[float]) -> float:
    """Where the axes of several scatter charts start: just below all values."""
    return min((min(column, default=-1.0) for column in columns), default=-1.0) * 1.03 - 0.05


@dataclass(frozen=True, kw_only=True)
class Outlined:
    """One histogram of several: its bins, and the d of the worst tokens that belong to it."""

    label: str
    bins: Bins
    marks: Sequence[float]
    colour: str
    dash: str


def diff_histogram(axes: Axes, found: Sequence[Outlined], *, ratio: float) -> None:
    """Tokens by d, on logarithmic axes both ways from 0; the worst tokens are marked at the foot."""
    from matplotlib.transforms import blended_transform_factory

    ends = [abs(end) for each in found for lower, upper, _ in each.bins for end in (lower, upper)]
    largest = max(*ends, *(abs(mark) for each in found for mark in each.marks)) or 1.0
    narrow = 10.0 ** (math.ceil(math.log10(largest)) - DECADES)
    foot = blended_transform_factory(axes.transData, axes.transAxes)
    for place, each in enumerate(found):
        edges, counts = outline(each.bins, narrow)
        axes.stairs(counts, edges, color=each.colour, linewidth=1.5, label=each.label, linestyle=each.dash)
        height = [0.04 + 0.06 * place] * len(each.marks)
        axes.plot(each.marks, height, "x", markersize=4, color=each.colour, transform=foot, clip_on=False)
    axes.set_yscale("log")
    power_ticks(axes.yaxis)
    axes.set_ylim(bottom=0.7)
    axes.set_xscale("symlog", linthresh=narrow, linscale=0.5)
    for bound in (-math.log(ratio), math.log(ratio)):
        axes.axvline(bound, color=GREY, linestyle=":", linewidth=1)
    limit = largest * 1.3
    axes.set_xlim(-limit, limit)
    powers = [narrow * 10.0**power for power in range(1, DECADES + 1)]
    ticks = [tick for tick in powers if tick <= limit]
    axes.set_xticks([*(-tick for tick in reversed(ticks)), 0, *ticks])
    axes.xaxis.set_major_formatter(lambda value, _: power_text(value))
    axes.set_xlabel("d = train - rollout, nats")
    axes.set_ylabel("tokens")
    legend(axes)


def outline(bins: Bins, narrow: float) -> tuple[list[float], list[int]]:
    """Edges and counts without holes; what lies within `narrow` of 0 is one bin, the axis having no room for more."""
    centre = sum(count for lower, upper, count in bins if -narrow <= lower and upper <= narrow)
    parts = [part for part in bins if part[0] < -narrow or part[1] > narrow]
    parts = [part for part in parts if part[1] <= 0] + [(-narrow, narrow, centre)] + [p for p in parts if p[1] > 0]
    edges, counts = [parts[0][0]], []
    for lower, upper, count in parts:
        start = max(lower, edges[-1])
        if not counts and upper <= start:
            upper = start + 0.05 * abs(start)
        if start > edges[-1]:
            edges.append(start)
            counts.append(0)
        if upper > start:
            edges.append(upper)
            counts.append(count)
        elif counts:
            counts[-1] += count
    return edges, counts
