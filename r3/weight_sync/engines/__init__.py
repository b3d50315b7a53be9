"""The engines that a weight sync can reach: `vllm.LLM`, `AsyncLLM`, a `vllm serve` by URL."""

import asyncio
import sys
from typing import Any

from r3.errors import SyncError
from r3.weight_sync.engines.async_llm import AsyncEngine
from r3.weight_sync.engines.engine import Engine, Reply, RunningRequests, checked_mode
from r3.weight_sync.engines.launched_llm import LaunchedEngine, is_launched
from r3.weight_sync.engines.offline_llm import OfflineEngine
from r3.weight_sync.engines.vllm_serve import ServerEngine

__all__ = ["Engine", "Reply", "RunningRequests", "engine_of"]


def engine_of(
    engine: Any,
    *,
    on_running: RunningRequests = "wait",
    loop: asyncio.AbstractEventLoop | None = None,
    api_key: str | None = None,
) -> Engine:
    """The adapter for `engine`.

    Args:
        engine: a `vllm.LLM`, an `AsyncLLM`, the URL of a `vllm serve` in development mode, or an `Engine`, which is
            returned unchanged. (`WeightSync` takes several: replicas, or the ranks of a data-parallel group.) Of LLMs
            that an external launcher started, each rank gives its own.
        on_running: what a pause does with requests that run: "wait" for their end, "abort" them, or "keep" them frozen
            (their keys and values are recomputed, and their next tokens come from the new weights). A `vllm.LLM` must
            be idle in each case.
        loop: of an `AsyncLLM`, where it cannot be found.
        api_key: of servers that want one.

    Raises:
        SyncError: something else.

    Example:
        >>> engine_of(llm).call("r3_status", timeout_s=10)[0]["state"]
        'idle'
    """
    mode = checked_mode(on_running)
    if isinstance(engine, Engine):
        return engine
    if isinstance(engine, str):
        return ServerEngine(engine, mode, api_key)
    if isinstance(engine, _loaded("vllm.entrypoints.llm", "LLM")):
        return LaunchedEngine(engine) if is_launched(engine) else OfflineEngine(engine)
    if isinstance(engine, _loaded("vllm.v1.engine.async_llm", "AsyncLLM")):
        return AsyncEngine(engine, mode, loop)
    raise SyncError(
        "engine: expected a vllm.LLM, an AsyncLLM or a URL (http://host:port), got "
        f"{type(engine).__module__}.{type(engine).__qualname__}"
    )


def _loaded(module: str, name: str) -> Any:
    """A class of vLLM, or no class where its module is not loaded: no object of it exists then."""
    return getattr(sys.modules.get(module), name, ())
