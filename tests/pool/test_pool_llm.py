"""A pool with a real `vllm.LLM`: what comes through it is what the engine says by itself."""

import pytest
import torch
from sync_helpers import following, greedy, prompts

from r3 import CaptureError, SyncError
from r3.capture import collect, sampling_kwargs
from r3.pool import EnginePool, PoolLimits
from r3.pool.samples import parts_of
from r3.weight_sync import WeightSync

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def pool(engine, reference):
    sync = WeightSync(engine, chunk_bytes=1 << 20, timeout_s=120)
    with EnginePool(sync, PoolLimits(max_in_flight=1)) as made:
        yield made


def same_rollouts(a, b) -> bool:
    return len(a) == len(b) and all(
        (x.prompt_ids, x.token_ids, x.prompt_index) == (y.prompt_ids, y.token_ids, y.prompt_index)
        and torch.equal(x.routing.expert_ids, y.routing.expert_ids)
        and torch.equal(x.logprobs, y.logprobs)
        for x, y in zip(a, b, strict=True)
    )


def test_rollouts_are_those_of_the_engine(engine, pool, demo_config, spec):
    """One request at a time: what shares a batch changes the last bits."""
    from vllm import SamplingParams

    ids = [prompt["prompt_token_ids"] for prompt in prompts(6)]
    sampling = sampling_kwargs(demo_config) | {"n": 1, "max_tokens": 16}
    assert engine.reset_prefix_cache()
    found = pool.generate(ids, sampling, spec, seed=7)
    assert engine.reset_prefix_cache()
    alone = [
        engine.generate(prompt, SamplingParams(**part.sampling), use_tqdm=False)[0]
        for prompt, part in zip(prompts(6), parts_of(ids, sampling, engines=1, seed=7), strict=True)
    ]
    assert same_rollouts(found, collect(alone, spec))
    assert {(item.engine, item.weight_versions) for item in found} == {("vllm.LLM", (pool.version,))}


def test_samples_of_a_prompt_come_one_after_the_other(pool, demo_config, spec):
    ids = [prompt["prompt_token_ids"] for prompt in prompts(6)]
    found = pool.generate(ids, sampling_kwargs(demo_config) | {"n": 3, "max_tokens": 16}, spec)
    assert [item.prompt_index for item in found] == [place for place in range(6) for _ in range(3)]
    assert [item.prompt_ids for item in found.items[::3]] == ids
    assert all(item.routing.rows_valid == len(item) - 1 for item in found)


def test_a_refused_request_is_named_and_costs_the_others_nothing(pool, demo_config, spec):
    ids = [prompt["prompt_token_ids"] for prompt in prompts(3)]
    sampling = sampling_kwargs(demo_config) | {"n": 2, "max_tokens": 4}
    found = pool.generate([ids[0], [3] * 600, ids[1]], sampling, spec, on_error="skip")
    assert [item.prompt_index for item in found] == [0, 0, 2, 2]
    with pytest.raises(CaptureError, match=r"(?s)prompt 1.*vllm.LLM refused a request"):
        pool.generate([ids[0], [3] * 600], sampling, spec)
    assert pool.engines == {"vllm.LLM": "serving"}


def test_a_push_through_the_pool_is_what_the_next_rollouts_say(engine, pool, weights, reference, demo_config, spec):
    ids = [prompt["prompt_token_ids"] for prompt in prompts(2)]
    version = following(pool.sync)
    assert pool.push(weights.items(), version=version).version == pool.version == version
    found = pool.generate(ids, sampling_kwargs(demo_config) | {"n": 1, "max_tokens": 4}, spec)
    assert {item.weight_versions for item in found} == {(version,)}
    last = list(weights)[-1]
    with pytest.raises(SyncError, match="NaN"):
        pool.push((weights | {last: weights[last] * torch.nan}).items(), version=version + 1)
    with pytest.raises(SyncError, match="half-loaded"):
        pool.generate(ids, {"n": 1}, spec)
    pool.push(weights.items(), version=version + 2)
    assert greedy(engine) == reference


def test_limits_and_arguments_are_checked(pool, spec):
    with pytest.raises(CaptureError, match="above 0"):
        PoolLimits(max_in_flight=0)
    with pytest.raises(CaptureError, match=r"without are \[1\] of 2"):
        pool.generate([[1], []], {"n": 1}, spec)
    with pytest.raises(CaptureError, match="one for each of 1 prompts, got 2"):
        pool.generate([[1]], {"n": 1}, spec, conversations=["a", "b"])
    with pytest.raises(SyncError, match="only engine"):
        pool.leave("vllm.LLM")
    assert pool.catch_up([]) is None
