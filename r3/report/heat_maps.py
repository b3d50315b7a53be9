"""Heat maps, and what goes with them: routing by layer over the steps, and the load of experts by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from r3.report.cells import layer_shares
from r3.report.charts import GREY, REPLAYED, legend, percentages
from r3.report.series import LARGEST, Records, mean, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_COLUMNS = 200
# Dark blue to yellow, by lightness: reads with any colour vision and in grey.
COLOURS = "cividis"


def layers_over_steps(records: Records) -> list[tuple[float, dict[int, float]]]:
    """Step and share of differing rows by layer, of the steps that have any that can be drawn."""
    shares = (
        {layer: share for layer, share in layer_shares(record).items() if abs(share) <= LARGEST} for record in records
    )
    return [(step, found) for step, found in zip(steps_of(records), shares, strict=True) if found]


def layer_lines(axes: Axes, recorded: Sequence[tuple[str, dict[int, float], str]]) -> None:
    """Share of differing rows over the layers: (name, shares, colour), the first ones under the later."""
    from matplotlib.ticker import MaxNLocator

    for place, (name, shares, colour) in enumerate(recorded):
        last = place == len(recorded) - 1
        marker, dash = ("s", "-") if last else ("o", "--")
        axes.plot(list(shares), list(shares.values()), dash, marker=marker, color=colour, label=name, linewidth=1.5)
    percentages(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("rows that differ")
    legend(axes)


def first_and_last(records: Records) -> list[tuple[str, dict[int, float], str]]:
    """What `layer_lines` draws of one run."""
    recorded = layers_over_steps(records)
    ends = dict((recorded[0], recorded[-1]))
    named = [(f"step {step:.0f}", shares) for step, shares in ends.items()]
    colours = (GREY, REPLAYED)[-len(named) :]
    return [(name, shares, colour) for (name, shares), colour in zip(named, colours, strict=True)]


def layer_map(axes: Axes, records: Records, *, most: float | None = None) -> str:
    """Share of differing rows, layer by step; returns what the caption has to say of it."""
    recorded = layers_over_steps(records)
    layers = sorted({layer for _, shares in recorded for layer in shares})
    width = math.ceil(len(recorded) / MOST_COLUMNS)
    bins = [recorded[at : at + width] for at in range(0, len(recorded), width)]
    rows = [[mean([shares[layer] for _, shares in found if layer in shares]) for found in bins] for layer in layers]
    image = axes.imshow(rows, aspect="auto", origin="lower", cmap=COLOURS, interpolation="none", vmin=0, vmax=most)
    axes.grid(False)
    _ticks(axes, [f"{found[0][0]:.0f}" for found in bins], list(map(str, layers)))
    axes.set_xlabel("step")
    axes.set_ylabel("decoder layer")
    _bar(axes, image, percent=True)
    return f"A column is the mean of {width} steps." if width > 1 else ""


def load_map(axes: Axes, loads: Sequence[Sequence[float]], layers: Sequence[int], *, most: float) -> None:
    """Load of each expert as a multiple of its layer's mean, layer by expert; `most` is the top of the scale."""
    image = axes.imshow(loads, aspect="auto", origin="lower", cmap=COLOURS, interpolation="none", vmin=0, vmax=most)
    axes.grid(False)
    _ticks(axes, [str(expert) for expert in range(len(loads[0]))], list(map(str, layers)))
    axes.set_xlabel("expert")
    axes.set_ylabel("decoder layer")
    _bar(axes, image, percent=False, extend="max" if max(map(max, loads)) > most else "neither")


def _ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    for ticks, labels, most in ((axes.set_xticks, columns, 6), (axes.set_yticks, rows, 8)):
        stride = math.ceil(len(labels) / most)
        ticks(range(0, len(labels), stride), labels[::stride])


def _bar(axes: Axes, image: Any, *, percent: bool, extend: str = "neither") -> None:
    bar = axes.figure.colorbar(image, ax=axes, extend=extend, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    if percent:
        percentages(bar.ax.yaxis)
