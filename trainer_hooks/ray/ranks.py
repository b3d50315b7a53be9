"""The process group of Ray Train's ranks. Imports Ray, and so is imported late."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

from trainer_hooks.launch import BACKEND, choose_interface


class RankBackend(TorchConfig().backend_cls):  # pyrefly: ignore
    """Ray Train's, whose ranks meet by the addresses that Ray has of their nodes."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class RankConfig(TorchConfig):
    """`TorchConfig` with `RankBackend`."""

    @property
    def backend_cls(self) -> Any:
        return RankBackend


def torch_config(*, gpus: bool) -> RankConfig:
    """With the backends of `trainer_hooks.process_group`."""
    return RankConfig(backend=BACKEND if gpus else "gloo")  # pyrefly: ignore


def _choose_interface() -> None:
    choose_interface(ray.util.get_node_ip_address())
