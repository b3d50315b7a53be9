"""Rollout routing replay (R3) for mixture-of-experts models: vLLM rollouts, stock Hugging Face training."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from r3.errors import (
    AlarmError,
    CaptureError,
    ConfigError,
    DiagnosticsError,
    EngineLostError,
    ParallelError,
    R3Error,
    ReplayError,
    RoutingError,
    SyncError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from r3 import (
        capture,
        config,
        diagnostics,
        doctor,
        experts,
        explain,
        numerics,
        parallel,
        pool,
        replay,
        report,
        routing,
        weight_sync,
    )
    from r3.config import R3Config
    from r3.replay import Replay, attach, record
    from r3.routing import RolloutRouting

__version__ = "0.1.0"

__all__ = [
    "AlarmError",
    "CaptureError",
    "ConfigError",
    "DiagnosticsError",
    "EngineLostError",
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
    "capture",
    "config",
    "diagnostics",
    "doctor",
    "experts",
    "explain",
    "numerics",
    "parallel",
    "pool",
    "record",
    "replay",
    "report",
    "routing",
    "weight_sync",
]


def __getattr__(name: str):
    # All but the errors is imported when first used, so that `import r3` costs nothing and loads no heavy package.
    if name in __all__:
        if find_spec(f"r3.{name}") is not None:
            return import_module(f"r3.{name}")
        for home in ("r3.config", "r3.routing", "r3.replay"):  # the lightest first
            if hasattr(module := import_module(home), name):
                return getattr(module, name)
    raise AttributeError(f"module 'r3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
