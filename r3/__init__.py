"""Rollout routing replay (R3) for mixture-of-experts models: vLLM rollouts, stock Hugging Face training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r3.config import R3Config
    from r3.errors import (
        CaptureError,
        ConfigError,
        DiagnosticsError,
        ParallelError,
        R3Error,
        ReplayError,
        RoutingError,
        SyncError,
        UnsupportedModelError,
    )
    from r3.replay import Replay, attach, record
    from r3.routing import RolloutRouting

__version__ = "0.1.0"

_HOME = {
    "attach": "r3.replay",
    "Replay": "r3.replay",
    "record": "r3.replay",
    "RolloutRouting": "r3.routing",
    "R3Config": "r3.config",
    "R3Error": "r3.errors",
    "CaptureError": "r3.errors",
    "ConfigError": "r3.errors",
    "DiagnosticsError": "r3.errors",
    "ParallelError": "r3.errors",
    "ReplayError": "r3.errors",
    "RoutingError": "r3.errors",
    "SyncError": "r3.errors",
    "UnsupportedModelError": "r3.errors",
}
_MODULES = ("capture", "diagnostics", "parallel", "replay", "report", "routing", "weight_sync")

__all__ = [
    "CaptureError",
    "ConfigError",
    "DiagnosticsError",
    "ParallelError",
    "R3Config",
    "R3Error",
    "Replay",
    "ReplayError",
    "RolloutRouting",
    "RoutingError",
    "SyncError",
    "UnsupportedModelError",
    "attach",
    "record",
]


def __getattr__(name: str):
    # Names are imported when first used, so that `import r3` costs nothing and loads no heavy package.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"r3.{name}")
    raise AttributeError(f"module 'r3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME, *_MODULES]
