"""Engines whose workers are on several GPUs: all get the trainer's weights, from one of these GPUs.

python -m pytest tests/test_sync_gpus.py -m gpu        # two GPUs
"""

import asyncio
import contextlib
import itertools
import threading

import pytest
import torch
from receivers import for_nccl
from syncs import following, prompts

from r3.capture import engine_kwargs
from r3.weight_sync import WeightSync

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

PARALLEL = {"tensor": {"tensor_parallel_size": 2}, "data": {"data_parallel_size": 2}}


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
        self.llm = asyncio.run_coroutine_threadsafe(start(), self._loop).result(280)

    def greedy(self):
        """Of each data-parallel rank, tokens and log-probabilities, from empty caches, one prompt at a time."""
        return asyncio.run_coroutine_threadsafe(self._greedy(), self._loop).result(120)

    async def _greedy(self):
        assert await self.llm.reset_prefix_cache()
        return [[await self._one(prompt, rank) for prompt in prompts()] for rank in range(self.ranks)]

    async def _one(self, prompt, rank):
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
        where = {"data_parallel_rank": rank} if self.ranks > 1 else {}
        async for output in self.llm.generate(prompt, sampling, f"{next(self._names)}", **where):
            completion = output.outputs[0]
        return [(t, entry[t].logprob) for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.llm.shutdown)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)


@pytest.fixture(scope="module", params=PARALLEL)
def running(request, demo_config):
    if torch.cuda.device_count() < 2:
        pytest.fail(f"needs two GPUs, got {torch.cuda.device_count()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_SOCKET_IFNAME", "lo")
        with contextlib.closing(Running(engine_kwargs(demo_config) | PARALLEL[request.param])) as made:
            made.reference = made.greedy()
            assert made.greedy() == made.reference, "the engine does not repeat itself: nothing can be compared"
            yield made


@pytest.mark.parametrize("transport", ["files", "gloo", "ipc", "nccl"])
def test_every_worker_gets_the_weights(running, weights, transport, monkeypatch):
    for name, value in for_nccl("trainer", torch.cuda.device_count()).items():
        monkeypatch.setenv(name, value)
    here = {name: tensor.cuda() for name, tensor in weights.items()}
    moved = {name: tensor + 0.01 * tensor.std() for name, tensor in here.items()}
    with contextlib.closing(WeightSync(running.llm, transport=transport, chunk_bytes=1 << 20, timeout_s=60)) as sync:
        for _ in range(2):
            receipt = sync.push(moved.items(), version=following(sync))
            assert receipt.workers == 2
            changed = running.greedy()
            assert all(rank != running.reference[0] for rank in changed)
            sync.push(here.items(), version=following(sync))
            assert running.greedy() == running.reference
