"""Several engines that are synced as one: replicas, and data-parallel ranks with a client each."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from r3.errors import SyncError, summary
from r3.weight_sync.engines.base import Engine, Reply
from r3.weight_sync.engines.waiting import in_thread


class EngineGroup(Engine):
    """All of `engines`, asked at the same time: data-parallel ranks pause and resume together, or wait for each other.

    Raises:
        SyncError: no engine, or one twice.
    """

    remedy = "Give the engines of all data-parallel ranks"

    def __init__(self, engines: Sequence[Engine]) -> None:
        names = [engine.name for engine in engines]
        twice = sorted({name for name in names if "://" in name and names.count(name) > 1})
        if not engines or twice:
            raise SyncError(f"engine: expected different engines, got {twice or 'an empty list'}")
        self._engines = list(engines)
        self.name = f"{len(engines)} engines ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        found = self._all(lambda engine: engine.replies(method, args, timeout_s))
        return [reply for replies in found for reply in replies]

    def pause(self, timeout_s: float) -> bool:
        served = self._outcomes(lambda engine: engine.pause(timeout_s))
        if any(future.exception() for future in served):
            for engine, future in zip(self._engines, served, strict=True):
                if future.exception() is None and future.result():
                    in_thread(lambda engine=engine: engine.resume(timeout_s))
        return all(self._results(served))

    def resume(self, timeout_s: float) -> None:
        self._all(lambda engine: engine.resume(timeout_s))

    def refuse(self, cause: str) -> None:
        self._all(lambda engine: engine.refuse(cause))

    def reset_caches(self, timeout_s: float) -> None:
        self._all(lambda engine: engine.reset_caches(timeout_s))

    def label(self, version: int, timeout_s: float) -> None:
        self._all(lambda engine: engine.label(version, timeout_s))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _all(self, function: Callable[[Engine], Any]) -> list[Any]:
        return self._results(self._outcomes(function))

    def _outcomes(self, function: Callable[[Engine], Any]) -> list[Future]:
        futures = [in_thread(lambda engine=engine: function(engine)) for engine in self._engines]
        wait(futures)  # each has a deadline of its own
        return futures

    def _results(self, futures: list[Future]) -> list[Any]:
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise SyncError(f"{len(errors)} of {len(futures)} engines:{summary(map(str, errors))}") from errors[0]
        return [future.result() for future in futures]
