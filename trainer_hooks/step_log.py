"""Where a step's metrics go, on the rank that keeps the run folder."""

from __future__ import annotations

import contextlib
from typing import Any

from r3.capture import Rollouts, SamplingSettings, save_rollouts
from r3.config import R3Config
from r3.diagnostics import Alarms, RunFolder, open_sinks
from r3.report import LiveTable


class StepLog:
    """The run folder, the sinks, the live table and the alarms of a run; a context manager.

    Raises:
        ConfigError: a sink whose package is missing, before anything is started.
    """

    def __init__(self, config: R3Config, folder: RunFolder) -> None:
        diagnostics = config.trainer.diagnostics
        self.config = config
        self.folder = folder
        self.alarms = Alarms(diagnostics)
        self.table = LiveTable(total=config.trainer.max_steps)
        self.sinks = open_sinks(
            diagnostics.sinks, run_folder=folder, settings=config.to_flat(), project=diagnostics.project
        )
        self._open = contextlib.ExitStack()

    def __enter__(self) -> StepLog:
        self._open.enter_context(self.sinks)
        self._open.enter_context(self.table)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def add(self, step: int, metrics: dict[str, float], details: dict[str, Any] | None) -> None:
        """Record a step, then look at its alarms.

        Raises:
            AlarmError: a metric is beyond a bound that stops the run; the step is recorded.
        """
        self.folder.log(step, metrics)
        if details is not None:
            self.folder.log_details(step, details)
        self.sinks.log(step, metrics)
        self.table.update({"step": step, **metrics})
        self.alarms.check(step, metrics)

    def save(self, step: int, rollouts: Rollouts) -> None:
        """Save the rollouts of a step under `rollouts/` in the run folder, as `r3 explain --rollout` reads them."""
        versions = {version for rollout in rollouts for version in rollout.weight_versions}
        settings = SamplingSettings.of(self.config, weight_version=max(versions, default=step - 1))
        path = self.folder.path / "rollouts" / f"step-{step:06d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_rollouts(rollouts, path, settings=settings)
