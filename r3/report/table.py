"""A live table of the steps on a terminal, or one log line a step elsewhere."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from r3.report.cells import COLUMNS, Column, layer_shares, percent

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"

logger = logging.getLogger("r3")


class LiveTable:
    """Shows the last `rows` steps as a table on standard error, which layers route differently, and the progress.

    Where standard error is not a terminal, or `rich` is not installed, each step is one line at level INFO of the
    logger "r3" instead. With `total` steps a bar says how many are done, and how long the others may take. `console`
    overrides where to draw.

    >>> with LiveTable() as table:
    ...     table.update({"step": 1, "reward/mean": 0.5})
    """

    def __init__(self, *, rows: int = 12, total: int | None = None, console: Console | None = None):
        self._total = total
        self._bar: Progress | None = None
        self._records: deque[dict[str, Any]] = deque(maxlen=rows)
        self._console = console
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        console = self._console or _terminal()
        if console is not None:
            from rich.live import Live

            self._console = console
            # No refresh thread: the table changes once a step, and a thread would draw over other output in between.
            self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
            if self._total is not None:
                self._bar = _progress(console, self._total)
                self._live.update(self._bar, refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step_metrics: Mapping[str, Any]) -> None:
        """Add one step, a mapping with the keys of `metrics.jsonl`; keys that are missing are shown as such."""
        self._records.append(dict(step_metrics))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step_metrics["step"])
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
        else:
            logger.info(step_line(step_metrics))

    def _view(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [self._fitted()]
        if line := layer_line(self._records[-1]):
            parts.append(Text(line, no_wrap=False))
        return Group(*parts, *([] if self._bar is None else [self._bar]))

    def _fitted(self) -> Table:
        assert self._console is not None
        columns = [column for column in COLUMNS if column.rank == 0 or column.recorded(self._records)]
        table = self._table(columns)
        # Measured as on an endless line: within the console's own width, every table fits, by cutting its numbers.
        endless = self._console.options.update(width=100_000)
        while any(c.rank for c in columns) and (
            self._console.measure(table, options=endless).maximum > self._console.width
        ):
            highest = max(column.rank for column in columns)
            columns = [column for column in columns if column.rank < highest]
            table = self._table(columns)
        return table

    def _table(self, columns: list[Column]) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in columns:
            # A heading takes as many lines as it has words, so that the numbers set the width.
            table.add_column(column.heading.replace(" / ", "/").replace(" ", "\n"), justify="right", no_wrap=True)
        for record in self._records:
            table.add_row(*(column.text(record).replace(" / ", "/") for column in columns))
        return table


def step_line(record: Mapping[str, Any]) -> str:
    """One step as one line of text, without what was not recorded."""
    cells = [f"{column.heading} {column.text(record)}" for column in COLUMNS if column.recorded([record])]
    if shares := layer_shares(record):
        cells.append(f"layers {percent(min(shares.values()))} to {percent(max(shares.values()))}")
    return ", ".join(cells)


def layer_line(record: Mapping[str, Any]) -> str:
    """One bar a decoder layer, the tallest being the layer with the most differing rows; empty without layers."""
    shares = layer_shares(record)
    if not shares:
        return ""
    most = max(shares, key=shares.__getitem__)
    top = shares[most] or 1.0
    bars = "".join(BARS[min(int(share / top * len(BARS)), len(BARS) - 1)] for share in shares.values())
    first, last = min(shares), max(shares)
    return f"differing rows, layers {first} to {last}: {bars}  most {percent(shares[most])} in layer {most}"


def _terminal() -> Console | None:
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        logger.warning("rich is not installed: one log line a step instead of a live table")
        return None
    return Console(stderr=True)


def _progress(console: Console, total: int) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Drawn by the table's `Live`, and never started itself.
    bar = Progress(*columns, console=console, auto_refresh=False, speed_estimate_period=float("inf"))
    bar.add_task("steps", total=total)
    return bar
