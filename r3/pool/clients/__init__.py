"""How requests get to an engine of each kind."""

from r3.errors import CaptureError
from r3.pool.clients.asynchronous import AsyncClient
from r3.pool.clients.client import EngineClient, EngineFailedError
from r3.pool.clients.offline import OfflineClient
from r3.pool.clients.server import ServerClient
from r3.weight_sync import Engine
from r3.weight_sync.engines.async_llm import AsyncEngine
from r3.weight_sync.engines.launched_llm import LaunchedEngine
from r3.weight_sync.engines.offline_llm import OfflineEngine
from r3.weight_sync.engines.vllm_serve import ServerEngine

__all__ = ["EngineClient", "EngineFailedError", "client_of"]


def client_of(adapter: Engine) -> EngineClient:
    """The client for the engine that a weight sync reaches by `adapter`. To be called in the pool's event loop.

    Raises:
        CaptureError: an engine of another kind, or one that an external launcher started, which all ranks must call.
    """
    if isinstance(adapter, ServerEngine):
        return ServerClient(adapter.name, adapter.api_key)
    if isinstance(adapter, AsyncEngine):
        return AsyncClient(adapter)
    if isinstance(adapter, OfflineEngine) and not isinstance(adapter, LaunchedEngine):
        return OfflineClient(adapter)
    raise CaptureError(
        f"{adapter.name}: expected the URL of a vllm serve, an AsyncLLM or a vllm.LLM that no external launcher "
        f"started, got {type(adapter).__name__}"
    )
