"""A pool with a real `AsyncLLM` on an event loop of its own."""

import os
import signal

import pytest
from async_engine import Running
from sync_helpers import following, prompts

from r3 import CaptureError
from r3.capture import engine_kwargs
from r3.pool import EnginePool, PoolLimits
from r3.weight_sync import WeightSync

pytestmark = [pytest.mark.engine, pytest.mark.long]

SAMPLING = {"temperature": 1.0, "max_tokens": 16, "logprobs": 0, "flat_logprobs": True, "detokenize": False, "n": 3}


@pytest.fixture(scope="module")
def running(demo_config):
    made = Running(engine_kwargs(demo_config))
    yield made
    made.close()


def test_rollouts_and_syncs_of_an_async_engine_and_its_death(running, weights, spec):
    """The last part kills it."""
    ids = [prompt["prompt_token_ids"] for prompt in prompts(6)]
    sync = WeightSync(running.llm, chunk_bytes=1 << 20, timeout_s=60)
    with EnginePool(sync, PoolLimits(health_every_s=0.5)) as pool:
        found = pool.generate(ids, SAMPLING, spec, seed=1)
        assert [item.prompt_index for item in found] == [place for place in range(6) for _ in range(3)]
        assert all(item.routing.rows_valid == len(item) - 1 for item in found)
        assert {(item.engine, item.weight_versions) for item in found} == {("AsyncLLM", (0,))}
        assert len({tuple(item.token_ids) for item in found}) == 18
        version = following(sync)
        assert pool.push(weights.items(), version=version).workers == 1
        again = pool.generate(ids, SAMPLING, spec, seed=1)
        assert {item.weight_versions for item in again} == {(version,)}
        with pytest.raises(CaptureError, match="AsyncLLM refused a request"):
            pool.generate([[3] * 600], SAMPLING, spec)
        os.kill(running.llm.engine_core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
        with pytest.raises(CaptureError, match="the engine has died"):
            pool.generate(ids, SAMPLING | {"max_tokens": 200}, spec)
        assert pool.engines == {"AsyncLLM": "lost"}
