"""The libraries that metrics go to; each is imported when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r3.diagnostics.sink_worker import Sink


class TensorBoard:
    """An event file in the run folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], project: str) -> None:
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import text

        self._writer = FileWriter(str(folder))
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        self._writer.add_summary(text("settings", f"| setting | value |\n|---|---|\n{rows}"))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all: SummaryWriter's `add_scalar` writes one for each.
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()])
        self._writer.add_summary(summary, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in trackio's own folder, or where its settings say."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], project: str) -> None:
        import trackio

        self._run = trackio.init(
            project=project,
            name=folder.name,
            config=dict(settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run of Weights & Biases, with its files in the run folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], project: str) -> None:
        import wandb

        # Without it a run that cannot upload never ends, and neither does the process. Older versions have none.
        limits: dict[str, Any] = {"finish_timeout": 60.0} if "finish_timeout" in wandb.Settings.model_fields else {}
        # A run of its own, whatever run the user's script has; and the console stays with the live table.
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off", reinit="create_new", **limits),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Ray:
    """Gauges of the Ray cluster that this process belongs to, one a metric: `ray_r3_reward_mean{run="first"}`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], project: str) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("expected a process of a Ray cluster, as trainer_hooks.ray.train_on_ray starts")
        self._run = {"run": folder.name}
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, values: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        for key, value in {"step": step, **values}.items():
            if key not in self._gauges:
                name = f"r3_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}"
                self._gauges[key] = Gauge(name, description=f"{key} of r3's last step", tag_keys=("run",))
            self._gauges[key].set(value, tags=self._run)

    def close(self) -> None:
        """Ray drops the gauges of a process that ends."""


SINK_TYPES: dict[str, Callable[[Path, Mapping[str, Any], str], Sink]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "ray": Ray,
}
HINTS = {
    "tensorboard": "",
    "trackio": "",
    "ray": "",
    "wandb": "; log in with `wandb login`, or set WANDB_MODE=offline",
}
