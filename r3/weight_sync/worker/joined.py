"""Worker extensions that are r3's and another's, made when vLLM asks for one: `r3.entry_points.joined_extension`."""

from importlib import import_module
from typing import Any

from r3.errors import SyncError
from r3.weight_sync.worker import WeightSyncWorker


def __getattr__(name: str) -> Any:
    """The class for a name in which colons stand for dots.

    Raises:
        SyncError: both classes define a method of one name.
    """
    if ":" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = name.rpartition(":")
    other = getattr(import_module(module.replace(":", ".")), attribute)
    both = sorted(own for own in set(dir(WeightSyncWorker)) & set(dir(other)) if not own.startswith("__"))
    if both:
        raise SyncError(
            f"worker extension {other.__module__}.{attribute}: expected other names than those of r3's worker "
            f"extension, got {', '.join(both)} in both. Start the engine with one of them"
        )
    return type(attribute, (WeightSyncWorker, other), {"__module__": __name__, "__qualname__": name})
