"""What a metric is: a name, a formula, and where it is shown and watched.

Each is declared once, beside the code that computes it. `r3.diagnostics.registry` collects them for the tables of the
docs, the report and the alarms.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

LAYER = "layer_NN"
"""Stands in a name for every decoder layer, by its number of two digits or more."""

# Sources that several metrics have.
SCHULMAN = "J. Schulman, [Approximating KL Divergence](http://joschu.net/blog/kl-approx.html), 2020"
KONG = "A. Kong, *A note on importance sampling using standardized weights*, 1992"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """How the report draws a metric over the steps. `title` and `caption` are HTML."""

    section: Literal["gap", "routing", "load", "coverage", "training"]
    title: str
    caption: str
    unit: str = ""
    """What the axis says, where that is more than the metric's unit."""
    label: str = ""
    """Of the curve, where there is one only; by default the last part of its key."""
    log: bool = False
    share: bool = False
    """Whether values are shown in percent."""
    from_zero: bool = False
    colour: Literal["live", "replayed", "third", "fourth"] = "third"
    """Of the curve, where there is one only."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """An alarm on a metric, with the bounds `trainer.diagnostics.alarms.{name}_warn` and `{name}_stop`."""

    name: str
    remedy: str
    worse: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, or several of one formula: `name_{a,b}` is `name_a` and `name_b`.

    Attributes:
        name: below the prefix of its group; may hold `layer_NN`.
        formula: Markdown, as are `notes` and `source`.
        unit: "1" for a number without one.
        source: where the formula comes from, if it is not ours.
        chart: how the report draws it, if it does.
        watch: how alarms watch it, if they do.
    """

    name: str
    formula: str
    unit: str = "1"
    notes: str = ""
    source: str = ""
    chart: Chart | None = None
    watch: Watch | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it stands for.

        >>> Metric(name="abs_{mean,max}", formula="").names
        ('abs_mean', 'abs_max')
        """
        parts = [part.strip("{}").split(",") for part in re.split(r"(\{[^}]*\})", self.name)]
        return tuple(map("".join, itertools.product(*parts)))


def without_layer(key: str) -> str:
    """The declared form of a recorded key.

    >>> without_layer("routing/differing_rows/layer_07")
    'routing/differing_rows/layer_NN'
    """
    return re.sub(r"(?<=/)layer_\d{2,}$", LAYER, key)
