"""An asynchronous engine in a tight place: few KV blocks, prefill in parts, many requests at once, some aborted."""

import asyncio

import pytest
import torch
from routing_flips import assert_explained, explained_flips, router_logits

import r3
from r3.capture import async_rollout, collect, engine_kwargs
from r3.routing import RolloutRouting

pytestmark = pytest.mark.engine

BLOCKS = 12
REQUESTS = 24


@pytest.fixture(scope="module")
def loop():
    made = asyncio.new_event_loop()
    yield made
    pending = asyncio.all_tasks(made)
    for task in pending:
        task.cancel()
    made.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    made.close()


@pytest.fixture(scope="module")
def model(demo_config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_config.trainer.policy.model.path, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def spec(model):
    return r3.attach(model).spec


class Preemptions:
    """Counts them, from the engine's statistics."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, vllm_config, engine_index=0):
        from vllm.v1.metrics.loggers import StatLoggerBase

        outer = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config, engine_index=0):
                pass

            def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
                if iteration_stats is not None:
                    outer.count += iteration_stats.num_preempted_reqs

            def log_engine_initialized(self):
                pass

        return Logger(vllm_config, engine_index)


@pytest.fixture(scope="module")
def preemptions():
    return Preemptions()


@pytest.fixture(scope="module")
def engine(demo_config, loop, preemptions):
    """`vllm.AsyncLLM`. Module-wide in place of the session's offline engine."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = engine_kwargs(demo_config) | {
        "num_gpu_blocks_override": BLOCKS,
        "max_num_batched_tokens": 64,
        "max_num_seqs": REQUESTS,
        "disable_log_stats": False,
    }

    async def start():
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings), stat_loggers=[preemptions])

    made = loop.run_until_complete(start())
    yield made
    made.shutdown()


def sampling(**settings):
    from vllm import SamplingParams

    return SamplingParams(**dict(temperature=1.0, logprobs=0, ignore_eos=True) | settings)


def prompts(count: int, shared: int = 140) -> list[list[int]]:
    """Prompts that share more than a block of 128 tokens, in two halves, and differ after it."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(2, 300, (n,), generator=generator).tolist()

    heads = [ids(shared), ids(shared)]
    return [heads[i % 2] + ids(3 + 2 * i) for i in range(count)]


def request(ids: list[int]) -> dict:
    return {"prompt_token_ids": ids}


class Counting:
    """What a rollout asks for its weight version at each output: tells when `count` have come."""

    def __init__(self, count: int) -> None:
        self.version, self.come = 5, asyncio.Event()
        self._left = count

    def __call__(self) -> int:
        self._left -= 1
        if not self._left:
            self.come.set()
        return self.version


async def everything(engine, spec, names, **settings):
    calls = [
        async_rollout(engine, request(ids), sampling(**settings), spec, request_id=f"{names}-{i}")
        for i, ids in enumerate(prompts(REQUESTS))
    ]
    return [item for found in await asyncio.gather(*calls) for item in found]


async def alone(engine, spec, item, name):
    """Routing of the rollout's tokens as one prefill, with nothing else and no cache."""
    assert await engine.reset_prefix_cache()
    ids = item.prompt_ids + item.token_ids
    (whole,) = await async_rollout(engine, request(ids), sampling(max_tokens=1), spec, request_id=name)
    assert whole.routing.rows_valid == len(ids)
    routing = whole.routing
    # The rollout has no row for its last token.
    valid = routing.valid[:, : len(ids)] & (torch.arange(len(ids)) < len(ids) - 1)
    return RolloutRouting(routing.expert_ids[:, : len(ids)], valid, routing.layer_ids, routing.num_experts)


def assert_alike(model, item, expected, capsys):
    report = explained_flips(item.routing, expected, router_logits(model, item.prompt_ids + item.token_ids, expected))
    with capsys.disabled():
        print(f"\n{report}")
    assert_explained(report)


@pytest.mark.parametrize("n", [1, 2])
def test_rows_of_many_requests_at_once_are_those_of_each_alone(engine, loop, model, spec, preemptions, capsys, n):
    before = preemptions.count
    items = loop.run_until_complete(everything(engine, spec, f"many-{n}", max_tokens=110, n=n))
    assert len(items) == n * REQUESTS
    assert preemptions.count > before, "the KV cache was large enough: nothing was preempted"
    for item in items:
        assert item.finish_reason == "length"
        assert item.routing.rows_valid == len(item) - 1
    for i in range(0, len(items), 7):
        expected = loop.run_until_complete(alone(engine, spec, items[i], f"alone-{n}-{i}"))
        assert_alike(model, items[i], expected, capsys)


@pytest.mark.parametrize("n", [pytest.param(1, marks=[pytest.mark.long, pytest.mark.release]), 2])
def test_requests_that_are_read_at_their_end_lose_nothing_beside_streams(
    engine, loop, model, spec, preemptions, capsys, n
):
    """Their tokens are held in the engine, also while they are preempted."""
    from vllm.sampling_params import RequestOutputKind

    async def at_end(ids, name):
        params = sampling(max_tokens=110, n=n, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [output async for output in engine.generate(request(ids), params, name)]
        return collect(outputs[-1:], spec).items

    async def mixed():
        calls = [
            async_rollout(engine, request(ids), sampling(max_tokens=110), spec, request_id=f"streams-{n}-{i}")
            if i % 2
            else at_end(ids, f"held-{n}-{i}")
            for i, ids in enumerate(prompts(REQUESTS))
        ]
        return (await asyncio.gather(*calls))[::2]

    before = preemptions.count
    found = loop.run_until_complete(mixed())
    assert preemptions.count > before
    items = [item for each in found for item in each]
    assert len(items) == n * REQUESTS // 2
    for item in items:
        assert (len(item.token_ids), item.finish_reason) == (110, "length")
        assert item.routing.rows_valid == len(item) - 1
    for i in range(0, len(items), 6):
        expected = loop.run_until_complete(alone(engine, spec, items[i], f"held-alone-{n}-{i}"))
        assert_alike(model, items[i], expected, capsys)
        ids = torch.tensor([items[i].prompt_ids + items[i].token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[-110:, 0]
        # The model alone is in bfloat16 as well, and sums in another order: off by less than 0.1 on average.
        assert float((items[i].logprobs - logprobs).abs().mean()) < 0.3


def test_stop_strings_leave_no_row_out(engine, loop, spec):
    """The front end ends these requests, at a step of its own."""
    ids = prompts(1)[0]
    (free,) = loop.run_until_complete(
        async_rollout(engine, request(ids), sampling(max_tokens=60, temperature=0.0), spec, request_id="free")
    )
    tokenizer = engine.get_tokenizer()
    text = tokenizer.decode(free.token_ids[20:24])
    (stopped,) = loop.run_until_complete(
        async_rollout(
            engine, request(ids), sampling(max_tokens=60, temperature=0.0, stop=[text]), spec, request_id="stop"
        )
    )
    assert stopped.finish_reason == "stop"
    assert 0 < len(stopped.token_ids) < 60
    assert stopped.routing.rows_valid == len(stopped) - 1


def test_aborted_requests_keep_the_rows_that_had_come(engine, loop, model, spec, capsys):
    async def run():
        ids, outputs = prompts(1)[0], Counting(100)
        running = asyncio.ensure_future(
            async_rollout(engine, request(ids), sampling(max_tokens=350), spec, request_id="aborted", version=outputs)
        )
        other = asyncio.ensure_future(
            async_rollout(engine, request(ids[:50]), sampling(max_tokens=100), spec, request_id="untouched")
        )
        await outputs.come.wait()
        await engine.abort("aborted")
        return (await running).items[0], (await other).items[0]

    aborted, untouched = loop.run_until_complete(run())
    assert aborted.finish_reason == "abort"
    assert untouched.routing.rows_valid == len(untouched) - 1
    assert 100 <= len(aborted.token_ids) < 350
    rows = aborted.routing.rows_valid
    assert len(aborted.prompt_ids) <= rows <= len(aborted) - 1
    assert len(aborted) - rows <= 65
    assert bool(aborted.routing.valid[0, :rows].all())
    expected = loop.run_until_complete(alone(engine, spec, aborted, "aborted-alone"))
    kept = RolloutRouting(
        expected.expert_ids, expected.valid & aborted.routing.valid, expected.layer_ids, expected.num_experts
    )
    assert_alike(model, aborted, kept, capsys)


def test_tokens_carry_the_version_under_which_they_came(engine, loop, spec):
    """The engine is paused where the weights would change, and goes on with the same request."""

    async def run():
        weights = Counting(30)
        running = asyncio.ensure_future(
            async_rollout(
                engine,
                request(prompts(1)[0]),
                sampling(max_tokens=200),
                spec,
                request_id="spans",
                version=weights,
            )
        )
        await weights.come.wait()
        await engine.pause_generation(mode="keep", clear_cache=False)
        await asyncio.sleep(0.2)  # longer than what was under way takes to come
        weights.version = 6
        await engine.resume_generation()
        return (await running).items[0]

    item = loop.run_until_complete(run())
    assert item.spans_versions
    assert item.weight_versions == (5, 6)
    versions = item.row_versions
    sampled = versions[len(item.prompt_ids) - 1 : -1]
    assert 30 <= int((sampled == 5).sum()) < 200
    assert versions[: len(item.prompt_ids)].tolist() == [5] * len(item.prompt_ids)
    assert versions[-2] == 6
    assert versions[-1] == -1
    assert bool((versions[:-1].diff() >= 0).all())


def test_a_rollout_that_comes_during_a_pause_is_not_lost(engine, loop, spec):
    """It queues up to vLLM 0.32. From 0.33 the engine rejects it, and it begins anew."""

    async def run():
        await engine.pause_generation(mode="wait", clear_cache=False)
        params = sampling(max_tokens=4, n=2)
        asked = async_rollout(engine, request(prompts(1)[0]), params, spec, request_id="paused", version=lambda: 7)
        running = asyncio.ensure_future(asked)
        await asyncio.sleep(1.0)
        assert not running.done()
        await engine.resume_generation()
        return (await running).items

    items = loop.run_until_complete(run())
    assert [len(item.token_ids) for item in items] == [4, 4]
    for item in items:
        assert item.weight_versions == (7,)
        assert item.routing.rows_valid == len(item) - 1


def test_outputs_in_parts_are_refused(engine, loop, spec):
    from vllm.sampling_params import RequestOutputKind

    params = sampling(max_tokens=2, output_kind=RequestOutputKind.DELTA)
    with pytest.raises(r3.CaptureError, match="expected CUMULATIVE, got DELTA"):
        loop.run_until_complete(async_rollout(engine, request([5, 6]), params, spec, request_id="parts"))
