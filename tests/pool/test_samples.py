"""How the samples of prompts are spread over engines, and put together again."""

import pytest
from simulated_engines import SimulatedEngine

from r3 import CaptureError
from r3.pool import EnginePool, PoolLimits
from r3.pool.samples import parts_of


def counts(prompts, samples, engines, max_tokens=100):
    parts = parts_of(prompts, {"n": samples, "max_tokens": max_tokens}, engines=engines)
    return [(part.prompt, part.sampling["n"]) for part in parts]


def test_samples_of_a_prompt_stay_together_where_there_are_enough_prompts():
    assert counts([[1] * 10] * 8, 16, engines=4) == [(place, 16) for place in range(8)]


def test_samples_are_spread_where_there_are_fewer_than_two_prompts_an_engine():
    assert counts([[1] * 10] * 2, 16, engines=4) == [(0, 4)] * 4 + [(1, 4)] * 4
    assert counts([[1] * 10] * 3, 8, engines=4) == [(p, n) for p in range(3) for n in (3, 3, 2)]
    assert counts([[1] * 10], 3, engines=64) == [(0, 1)] * 3


def test_a_long_prompt_is_not_computed_more_often_than_its_samples_are_worth():
    assert counts([[1] * 2000], 8, engines=4, max_tokens=100) == [(0, 8)]
    assert counts([[1] * 400], 8, engines=4, max_tokens=100) == [(0, 4), (0, 4)]


def test_a_seed_gives_each_sample_its_numbers_wherever_it_is_sampled():
    def seeds(engines):
        parts = parts_of([[1] * 10] * 3, {"n": 8, "max_tokens": 50}, engines=engines, seed=5)
        return [part.sampling["seed"] + sample for part in parts for sample in range(part.sampling["n"])]

    assert seeds(1) == seeds(4) == seeds(64)
    assert len(set(seeds(1))) == 24
    assert seeds(1) != [part.sampling["seed"] for part in parts_of([[1]] * 24, {"n": 1}, engines=1, seed=6)]


def response(prompt, samples, token):
    logprobs = {"content": [{"token": f"token_id:{token}", "logprob": -0.5}]}
    choice = {"token_ids": [token], "logprobs": logprobs, "finish_reason": "stop"}
    return {"prompt_token_ids": list(prompt), "choices": [{"index": i, **choice} for i in range(samples)]}


class Answering(SimulatedEngine):
    """Answers with rollouts whose token is the engine's number."""

    def _answer(self, answer, number):
        request = self.asked[number - 1]
        if self.fails or self.silent:
            super()._answer(answer, number)
        elif not answer.done():
            answer.set_result(response(request.prompt_ids, request.samples, int(self.name[-1])))


class Adapter:
    """The part of an engine's adapter that a pool asks for by itself."""

    def __init__(self, name, version=None, cause=""):
        self.name, self.status = name, {"version": version, "cause": cause}

    def replies(self, method, args, timeout_s):
        return [self.status]


class NoSync:
    """What a pool reads of its weight sync."""

    poisoned, lost, removes_lost = None, {}, False

    def __init__(self, *adapters):
        self.engines = adapters
        self.closed = 0

    def require_committed(self): ...

    def close(self):
        self.closed += 1


def pool_of(*adapters, seconds=0.01, **limits):
    engines = {}

    def client(adapter):
        engines[adapter.name] = Answering(adapter.name, seconds)
        return engines[adapter.name]

    limits = PoolLimits(health_every_s=0.05, health_timeout_s=0.1, **limits)
    return EnginePool(NoSync(*adapters), limits, client=client), engines


def test_rollouts_come_in_the_order_of_the_prompts_with_engine_and_version():
    pool, _ = pool_of(Adapter("engine-1", 7), Adapter("engine-2", 7), Adapter("engine-3", 7))
    with pool:
        prompts = [[1 + place, 2] for place in range(40)]
        found = pool.generate(prompts, {"n": 4, "max_tokens": 1}, None)
    assert [item.prompt_ids for item in found.items[::4]] == prompts
    assert [item.prompt_index for item in found] == [place for place in range(40) for _ in range(4)]
    assert {item.engine for item in found} == {"engine-1", "engine-2", "engine-3"}
    assert all(item.token_ids == [int(item.engine[-1])] for item in found)
    assert {item.weight_versions for item in found} == {(7,)}
    assert pool.sync.closed == 1
    pool.close()
    assert pool.sync.closed == 1


def test_weights_that_change_while_an_engine_has_a_request_are_both_named():
    pool, engines = pool_of(Adapter("engine-1", 7), seconds=0.3)
    with pool:
        pool._thread.start(later(0.1, lambda: setattr(pool._dispatcher, "version", 8)))
        (found,) = pool.generate([[1, 2]], {"n": 1, "max_tokens": 1}, None)
    assert (found.weight_versions, found.spans_versions, found.weight_version) == ((7, 8), True, None)
    assert len(engines["engine-1"].asked) == 1


async def later(seconds, action):
    import asyncio

    await asyncio.sleep(seconds)
    action()


def test_engines_of_older_or_no_trusted_weights_wait_for_a_sync():
    pool, engines = pool_of(Adapter("engine-1", 7), Adapter("engine-2", 6), Adapter("engine-3", 7, "poisoned"))
    with pool:
        assert pool.engines == {"engine-1": "serving", "engine-2": "joining", "engine-3": "joining"}
        found = pool.generate([[1, 2]] * 8, {"n": 1, "max_tokens": 1}, None)
        assert {item.engine for item in found} == {"engine-1"}
    assert not engines["engine-2"].asked
    pool, _ = pool_of(Adapter("engine-1", 7, "poisoned"))
    with pool, pytest.raises(CaptureError, match=r"(?s)no engine of the pool serves.*engine-1: joining"):
        pool.generate([[1, 2]], {"n": 1}, None)


def test_when_all_engines_are_lost_the_error_says_why_and_nothing_waits():
    pool, engines = pool_of(Adapter("engine-1"), Adapter("engine-2"), seconds=0.02)
    with pool:
        for engine in engines.values():
            engine.silent = True
        with pytest.raises(CaptureError, match=r"(?s)8 of 8 samples.*no answer to 3 health checks"):
            pool.generate([[1, 2]] * 8, {"n": 1, "max_tokens": 1}, None)
        assert set(pool.engines.values()) == {"lost"}


def test_a_caller_that_is_interrupted_leaves_nothing_in_flight(monkeypatch):
    pool, engines = pool_of(Adapter("engine-1"), seconds=30.0, max_in_flight=2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pool:
        monkeypatch.setattr("r3.pool.pool.futures.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.generate([[1, 2]] * 8, {"n": 1, "max_tokens": 1}, None)
        monkeypatch.undo()
        pool._thread.start(later(0.05, lambda: None)).result(5)
        assert engines["engine-1"].in_flight == 0
        assert pool._dispatcher.members[0].load == 0


def test_callers_of_an_event_loop_wait_side_by_side():
    import asyncio

    pool, _ = pool_of(Adapter("engine-1"), Adapter("engine-2"), seconds=0.05)

    async def many():
        asked = [pool.generate_async([[1, place]], {"n": 2, "max_tokens": 1}, None) for place in range(2, 30)]
        return await asyncio.gather(*asked)

    with pool:
        found = asyncio.run(many())
    assert [rollouts.items[0].prompt_ids for rollouts in found] == [[1, place] for place in range(2, 30)]
    assert all(len(rollouts) == 2 for rollouts in found)
