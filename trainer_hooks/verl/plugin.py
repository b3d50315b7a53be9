"""Puts the engine with replay into verl's registry, as soon as verl's own engines are imported."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENGINES = "verl.workers.engine"
WORKERS = "verl.workers.engine_workers"
_CHECKED = "_r3_checks_sampling"


class _AfterImport(MetaPathFinder):
    """Calls `then` once, when module `name` has been imported.

    A plugin is loaded while verl itself is being imported, in servers and drivers too. To import the engines there
    would cost each of them seconds, and would fix verl's platform before the plugins of other platforms are loaded.
    """

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self._then = then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_then(module: ModuleType) -> None:
            run(module)
            self._then()

        spec.loader.exec_module = run_and_then
        return spec


def install() -> None:
    """Register the engine, and have the actors' sampling checked, now or when verl imports its own."""
    for name, then in ((ENGINES, _register), (WORKERS, _check_sampling)):
        if name in sys.modules:
            then()
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, then))


def _register() -> None:
    """For the platform of this process, which verl's lookup prefers to engines without one, and for vendor "r3"."""
    from verl.utils.device import get_device_name, get_vendor
    from verl.workers.engine import EngineRegistry

    from trainer_hooks.verl.engine import RoutingReplayEngine

    vendors = sorted({get_vendor(), "r3"})
    place = EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=get_device_name(), vendor=vendors)
    place(RoutingReplayEngine)


def _check_sampling() -> None:
    """When a worker has made its actor: the actor's engine does not see what the rollouts are sampled with.

    Not when the worker itself is made: where `external_lib` alone loads this plugin, that is over.
    """
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from trainer_hooks.verl.mode import require_supported_sampling

    register: Any = ActorRolloutRefWorker.set_dispatch_collect
    if hasattr(register, _CHECKED):
        return

    @functools.wraps(register)
    def checked(self: Any, mesh_name: str, *args: Any, **kwargs: Any) -> None:
        if mesh_name == "actor":
            require_supported_sampling(self.config)
        register(self, mesh_name, *args, **kwargs)

    setattr(checked, _CHECKED, True)
    ActorRolloutRefWorker.set_dispatch_collect = checked
