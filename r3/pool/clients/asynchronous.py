"""Requests to an `AsyncLLM` of this process, on its own event loop."""

import asyncio
import itertools
from typing import Any

from r3.errors import CaptureError
from r3.pool.clients.client import EngineClient, EngineFailedError, finished
from r3.pool.request import Request
from r3.weight_sync.engines.async_llm import AsyncEngine


class AsyncClient(EngineClient):
    """Each request is a coroutine on the engine's loop.

    Args:
        adapter: of the `AsyncLLM`, as the weight sync has it.
    """

    def __init__(self, adapter: AsyncEngine) -> None:
        self.name = adapter.name
        self._adapter = adapter
        self._numbers = itertools.count()

    def start(self, request: Request) -> asyncio.Future:
        coroutine = self._run(request, f"r3-pool-{id(self):x}-{next(self._numbers)}")
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._adapter.event_loop()))

    async def cause_of_death(self, timeout_s: float) -> str | None:
        return self._adapter.cause_of_death()

    async def _run(self, request: Request, request_id: str) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        last = None
        try:
            sampling = SamplingParams(**request.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            async for output in self._adapter.engine.generate(prompt, sampling, request_id):
                last = output
        except Exception as error:
            if (cause := self._adapter.cause_of_death()) is not None:
                raise EngineFailedError(cause) from error
            raise CaptureError(f"{self.name} refused a request: {type(error).__name__}: {error}") from error
        if last is None:
            raise EngineFailedError("it ended the request without an output")
        return finished(last)
