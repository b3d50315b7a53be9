"""Requests to a `vllm.LLM` of this process: what has come meanwhile is its next batch."""

import asyncio
from typing import Any, ClassVar

from r3.errors import CaptureError
from r3.pool.clients.client import EngineClient, EngineFailedError, finished
from r3.pool.request import Request
from r3.weight_sync.engines.deadline import in_thread
from r3.weight_sync.engines.offline_llm import OfflineEngine


class OfflineClient(EngineClient):
    """One batch at a time, in a thread: `LLM.generate` takes no request while it runs.

    Args:
        adapter: of the `vllm.LLM`, as the weight sync has it.
    """

    idle_for_sync: ClassVar[bool] = True

    def __init__(self, adapter: OfflineEngine) -> None:
        self.name = adapter.name
        self._adapter = adapter
        self._next: list[tuple[Request, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    def start(self, request: Request) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._next.append((request, answer))
        if self._worker is None:
            self._worker = loop.create_task(self._work())  # begins when all of this turn of the loop have come
        return answer

    async def cause_of_death(self, timeout_s: float) -> str | None:
        return self._adapter.cause_of_death()

    async def _work(self) -> None:
        try:
            while self._next:
                batch, self._next = [(r, f) for r, f in self._next if not f.done()], []
                await self._run(batch)
        finally:
            self._worker = None

    async def _run(self, batch: list[tuple[Request, asyncio.Future]]) -> None:
        try:
            outputs = await asyncio.wrap_future(in_thread(lambda: self._generate([request for request, _ in batch])))
        except Exception as error:
            if self._adapter.cause_of_death() is None and len(batch) > 1:
                for one in batch:  # one that the engine refuses must not cost the others
                    await self._run([one])
                return
            for _, answer in batch:
                _end(answer, self._failure(error))
            return
        for (_, answer), output in zip(batch, outputs, strict=True):
            _end(answer, output)

    def _generate(self, requests: list[Request]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        return self._adapter.llm.generate(prompts, [SamplingParams(**r.sampling) for r in requests], use_tqdm=False)

    def _failure(self, error: Exception) -> Exception:
        if (cause := self._adapter.cause_of_death()) is not None:
            return EngineFailedError(cause)
        return CaptureError(f"{self.name} refused a request: {type(error).__name__}: {error}")


def _end(answer: asyncio.Future, output: Any) -> None:
    if answer.done():
        return
    if isinstance(output, Exception):
        answer.set_exception(output)
        return
    try:
        answer.set_result(finished(output))
    except EngineFailedError as error:
        answer.set_exception(error)
