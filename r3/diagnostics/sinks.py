"""Where metrics go beside the run folder: TensorBoard, trackio, Weights & Biases, gauges of a Ray cluster.

1. `metrics.jsonl` is the record, and `RunFolder.log` writes it: a sink is a view of it, and may lose steps.
2. A training step hands its metrics to one bounded queue a sink, and never waits: what does not fit is dropped, what a
   library raises is caught. Both are counted, and logged once when they begin and summed up at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3.config import SINKS
from r3.diagnostics.run_folder import RunFolder
from r3.diagnostics.sink_types import HINTS, SINK_TYPES
from r3.diagnostics.sink_worker import Sink, SinkCounts, SinkWorker
from r3.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

QUEUE_STEPS = 256


class Sinks:
    """Several sinks, each with a thread and a queue of its own; close it, or use it as a context manager.

    Made by `open_sinks`. Nothing that a library does raises or waits here.
    """

    def __init__(self, sinks: Mapping[str, Sink], *, queue_steps: int = QUEUE_STEPS) -> None:
        self._workers = {name: SinkWorker(name, sink, queue_steps) for name, sink in sinks.items()}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over the finite numbers among `metrics`; the others are in the run folder alone.

        Raises `DiagnosticsError` after `close`.
        """
        if not self._workers:
            return
        values = {key: value for key, found in metrics.items() if (value := _finite(found)) is not None}
        for worker in self._workers.values():
            worker.put(step, values)

    @property
    def counts(self) -> dict[str, SinkCounts]:
        """What has become of the steps so far, by sink."""
        return {name: worker.counts for name, worker in self._workers.items()}

    def close(self, timeout_s: float = 60.0) -> None:
        """Write what is queued and close the sinks, all within `timeout_s`; says what was lost. Again: nothing."""
        deadline = time.monotonic() + timeout_s
        for worker in self._workers.values():
            worker.finish()
        for worker in self._workers.values():
            worker.wait(deadline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_sinks(names: Sequence[str], *, run_folder: RunFolder, settings: Mapping[str, Any], project: str) -> Sinks:
    """The named sinks, ready to take the metrics of a run; none for no names.

    TensorBoard's event file goes into the run folder, and so do the files of wandb; trackio keeps its own folder, with
    `project` in it. A run is named like its folder. Where data is sent, if at all, is set as these libraries' own
    documentation says (`WANDB_MODE`, `TRACKIO_DIR`, ...).

    Raises `ConfigError` for unknown names, packages that are missing, and sinks that cannot be started.
    """
    require_sinks(names)
    opened: dict[str, Sink] = {}
    with ExitStack() as undo:
        undo.callback(lambda: Sinks(opened).close(timeout_s=10.0))
        for name in names:
            opened[name] = _open(name, run_folder.path, settings, project)
        undo.pop_all()
    return Sinks(opened)


def _open(name: str, folder: Path, settings: Mapping[str, Any], project: str) -> Sink:
    try:
        return SINK_TYPES[name](folder, settings, project)
    except Exception as error:
        raise ConfigError(
            f"trainer.diagnostics.sinks: {name} could not be started: {type(error).__name__}: {error}{HINTS[name]}"
        ) from error


def require_sinks(names: Sequence[str]) -> None:
    """Raise `ConfigError` if a sink is unknown or its package cannot be imported; says how to install it."""
    if problems := [problem for name in names if (problem := _import_problem(name))]:
        raise ConfigError(f"trainer.diagnostics.sinks: {'; '.join(problems)}")


def _import_problem(name: str) -> str:
    if name not in SINKS:
        return f"expected any of {', '.join(SINKS)}, got {name!r}"
    try:
        import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error}): `pip install {name}`, or leave it out"
    return ""


def _finite(value: Any) -> float | None:
    try:
        plain = value.item() if hasattr(value, "item") else value
        number = float(plain) if isinstance(plain, int | float) else math.nan
    except (ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None
