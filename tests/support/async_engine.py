"""An `AsyncLLM` for the tests of syncs, on an event loop of its own."""

import asyncio
import itertools
import threading

from sync_helpers import prompts


class Running:
    """An `AsyncLLM` on an event loop of its own."""

    def __init__(self, settings) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

        self.ranks = settings.get("data_parallel_size", 1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._names = itertools.count()
        self.llm = self.run(start(), 280)

    def run(self, coroutine, timeout_s=120):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def greedy(self):
        """Of each data-parallel rank, tokens and log-probabilities, from empty caches, one prompt at a time."""
        return self.run(self._greedy())

    async def _greedy(self):
        assert await self.llm.reset_prefix_cache()
        return [[await self.one(prompt, rank) for prompt in prompts()] for rank in range(self.ranks)]

    async def one(self, prompt, rank=0):
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
        where = {"data_parallel_rank": rank} if self.ranks > 1 else {}
        async for output in self.llm.generate(prompt, sampling, f"{next(self._names)}", **where):
            completion = output.outputs[0]
        return [(t, entry[t].logprob) for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.llm.shutdown)
        self.run(asyncio.sleep(0.1))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
