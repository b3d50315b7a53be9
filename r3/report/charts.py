"""Drawing: matplotlib figures without global state, and SVG whose colours are the page's.

Colours are told apart with any colour vision (Okabe and Ito's palette), and markers and dashes differ with them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from r3.report.series import Records, Series, series, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIVE, REPLAYED, THIRD, FOURTH = "#d55e00", "#0072b2", "#009e73", "#cc79a7"
GREY = "#808080"
# Stands for the page's text colour until the SVG is written; no palette has it.
INK = "#010203"
_VARIABLES = {LIVE: "--live", REPLAYED: "--replayed", THIRD: "--third", FOURTH: "--fourth"}
_MARKED_POINTS = 60
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """One curve: `factor` times the values of `key`; of many steps the mean, or the `largest`."""

    key: str
    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"
    factor: float = 1.0
    largest: bool = False


@contextmanager
def styled(ink: str = INK) -> Generator[None, None, None]:
    """Matplotlib's settings for these charts, put back on leaving."""
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, ink) | {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 1.8,
        "legend.borderaxespad": 0.2,
        "lines.markersize": 3.5,
        "font.size": 8.5,
        "axes.titlesize": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "r3",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float = 4.3, height: float = 2.9) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves(axes: Axes, found: Sequence[tuple[Records, Line]], *, log: bool = False) -> str:
    """Draw the recorded ones over the steps; returns what the caption has to say of it.

    A log scale leaves out what is not positive. A long run is drawn in bins of steps: their mean, or their largest,
    and a band from the smallest to the largest.
    """
    left_out, width = 0, 1
    for records, line in found:
        points = series(records, line.key, factor=line.factor, log=log, largest=line.largest)
        if log:
            plain = series(records, line.key, factor=line.factor)
            left_out += sum(value <= 0 for value in plain.low)
        if not all(map(math.isnan, points.middle)):
            _draw(axes, points, line)
            width = max(width, points.width)
    if axes.lines and log:
        _log_scale(axes)
    over_steps(axes, [step for records, _ in found for step in steps_of(records)])
    legend(axes)
    notes = []
    if left_out:
        notes.append(f"Left out of the log scale, not being above zero: {left_out}.")
    if width > 1:
        notes.append(f"A point stands for {width} steps; the band has all of them.")
    return " ".join(notes)


def _draw(axes: Axes, points: Series, line: Line) -> None:
    marker = line.marker if len(points.steps) <= _MARKED_POINTS else ""
    axes.plot(points.steps, points.middle, line.dash, marker=marker, color=line.colour, label=line.label, linewidth=1.5)
    if points.width > 1:
        axes.fill_between(points.steps, points.low, points.high, color=line.colour, alpha=0.2, linewidth=0)


def _log_scale(axes: Axes) -> None:
    """A log scale whose ticks say where it is also within one power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    power_ticks(axes.yaxis, between=high < 100 * low)


def power_ticks(axis: object, *, between: bool = False) -> None:
    """Ticks of a logarithmic axis at whole powers of ten, and at 2 and 5 times those `between` them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if between else (1.0,)))  # pyrefly: ignore
    axis.set_major_formatter(lambda value, _: power_text(value))  # pyrefly: ignore
    axis.set_minor_formatter(NullFormatter())  # pyrefly: ignore


def power_text(value: float) -> str:
    """A power of ten, or a small multiple of one, as it is written in a text; from 0.1 to 1000 in full."""
    if not value:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -1 <= power <= 3:
        size = f"{abs(value):g}"
    else:
        times = f"{abs(value) / 10.0**power:.2g}"
        size = ("" if times == "1" else f"{times}·") + "10" + str(power).translate(_RAISED)
    return f"-{size}" if value < 0 else size


def over_steps(axes: Axes, steps: Sequence[float]) -> None:
    """An x axis of steps, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if steps and min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")


def legend(axes: Axes) -> None:
    """The names of the curves above the axes, where no curve can be under them."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=2, columnspacing=1.2, labelspacing=0.2)


def percentages(axis: object) -> None:
    """Ticks of an axis that has shares, in percent."""
    # Not more digits than a label has room for, whatever a run has recorded.
    axis.set_major_formatter(lambda value, _: f"{100 * value:.6g}%")  # pyrefly: ignore


def svg(drawn: Figure, *, name: str, label: str) -> str:
    """The figure as an `<svg>` element to put into a page.

    `name` keeps its ids apart from those of other figures; `label`, plain text, says what there is to see.
    """
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = text.replace(INK, "currentColor")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Places, not scales, have more digits than a pixel has use for.
    text = re.sub(r'\s(d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
