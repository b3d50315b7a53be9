"""Charts of a run: matplotlib figures without global state, and SVG that takes its text colour from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3.diagnostics.cells import layer_shares, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by readers with any colour vision; markers differ as well.
VERMILLION, BLUE, GREEN, PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
GREY = "#808080"
# Stands for the page's text colour until the SVG is written; no palette has it.
INK = "#010203"

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """One curve: `factor` times the values of `key`."""

    key: str
    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"
    factor: float = 1.0


K3 = (
    Line("logprob_diff/live/k3", "live routing", VERMILLION),
    Line("logprob_diff/replayed/k3", "replayed routing", BLUE, "s"),
)
ABS = (
    Line("logprob_diff/live/abs_max", "live, max", VERMILLION, "^", "--"),
    Line("logprob_diff/replayed/abs_max", "replayed, max", BLUE, "v", "--"),
    Line("logprob_diff/live/abs_mean", "live, mean", VERMILLION),
    Line("logprob_diff/replayed/abs_mean", "replayed, mean", BLUE, "s"),
)
REWARD = (Line("reward/mean", "mean reward", GREEN),)
SYNC_SECONDS = (Line("sync/seconds", "seconds", PURPLE),)
SYNC_BYTES = (Line("sync/bytes", "MiB", GREEN, "s", factor=2.0**-20),)


def steps_of(records: Records) -> list[float]:
    """The step of each record, or its place where it has none."""
    found = [number(record, "step") for record in records]
    return [float(place) if math.isnan(step) else step for place, step in enumerate(found)]


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
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.markersize": 4,
        "font.size": 10,
        "axes.titlesize": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "r3",
    }
    with matplotlib.rc_context(settings):
        yield


def curves(axes: Axes, records: Records, lines: Sequence[Line], *, log: bool = False) -> int:
    """Draw the recorded ones of `lines` over the steps; a log scale leaves out what is not positive.

    Returns how many values a log scale left out.
    """
    from matplotlib.ticker import MaxNLocator

    steps, left_out = steps_of(records), 0
    for line in lines:
        values = [number(record, line.key) * line.factor for record in records]
        if log:
            left_out += sum(value <= 0 for value in values)
            values = [value if value > 0 else math.nan for value in values]
        if not all(map(math.isnan, values)):
            marker = line.marker if len(steps) <= 80 else ""
            axes.plot(steps, values, line.dash, marker=marker, color=line.colour, label=line.label, linewidth=1.6)
    if axes.lines and log:
        axes.set_yscale("log")
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    if len(axes.lines) > 1:
        axes.legend(loc="best")
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    return left_out


def figure(width: float = 9.4, height: float = 3.2) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def layer_lines(axes: Axes, records: Records) -> None:
    """Share of differing rows over the layers, at the first and the last step that recorded it."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    recorded = _layers_over_steps(records)
    ends = dict((recorded[0], recorded[-1]))
    for (step, shares), colour, marker in zip(ends.items(), (GREY, BLUE), "os", strict=False):
        colour = BLUE if len(ends) == 1 else colour
        axes.plot(list(shares), list(shares.values()), marker=marker, color=colour, label=f"step {step:.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("rows that differ")
    axes.legend(loc="best")


def layer_map(axes: Axes, records: Records) -> None:
    """Share of differing rows, layer by step, as a heat map."""
    from matplotlib.ticker import PercentFormatter

    recorded = _layers_over_steps(records)
    layers = sorted({layer for _, shares in recorded for layer in shares})
    values = [[shares.get(layer, math.nan) for _, shares in recorded] for layer in layers]
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="cividis", interpolation="none", vmin=0)
    axes.grid(False)
    for ticks, labels in ((axes.set_xticks, [f"{step:.0f}" for step, _ in recorded]), (axes.set_yticks, layers)):
        stride = math.ceil(len(labels) / 8)
        ticks(range(0, len(labels), stride), [str(label) for label in labels[::stride]])
    axes.set_xlabel("step")
    axes.set_ylabel("decoder layer")
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)


def _layers_over_steps(records: Records) -> list[tuple[float, dict[int, float]]]:
    shares = map(layer_shares, records)
    return [(step, found) for step, found in zip(steps_of(records), shares, strict=True) if found]


def svg(drawn: Figure, *, name: str, label: str) -> str:
    """The figure as an `<svg>` element to put into a page; `name` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
