"""A pool of real `vllm serve`s: capture, syncs, engines that join, leave, stand still and die."""

import logging
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch
from pool_servers import pool_servers
from sync_helpers import prompts

from r3 import SyncError
from r3.pool import EnginePool, PoolLimits
from r3.weight_sync import WeightSync, engine_of

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

TIMEOUT_S = 6.0
ONE_AT_A_TIME = PoolLimits(max_in_flight=1, health_every_s=0.5, health_timeout_s=2.0)
SAMPLING = {"temperature": 1.0, "max_tokens": 16, "logprobs": 0, "flat_logprobs": True, "detokenize": False}


@pytest.fixture(scope="module")
def servers():
    with pool_servers(3) as made:
        yield made


def ids(count: int, length: int = 24) -> list[list[int]]:
    return [prompt["prompt_token_ids"] for prompt in prompts(count, length)]


def pool_of(servers, *, limits=ONE_AT_A_TIME, **settings) -> EnginePool:
    settings = {"chunk_bytes": 1 << 20, "timeout_s": TIMEOUT_S, "dtype": torch.bfloat16} | settings
    return EnginePool(WeightSync([server.url for server in servers], **settings), limits)


def newest(pool) -> int:
    """A version above all that any server has: they outlive the pools of the tests."""
    return int(time.time())


def changed(weights, factor: float):
    return [
        (name, tensor * factor if name.endswith("embed_tokens.weight") else tensor) for name, tensor in weights.items()
    ]


def same(a, b) -> bool:
    return all(
        (x.prompt_ids, x.token_ids, x.prompt_index) == (y.prompt_ids, y.token_ids, y.prompt_index)
        and torch.equal(x.routing.expert_ids, y.routing.expert_ids)
        and torch.equal(x.logprobs, y.logprobs)
        for x, y in zip(a, b, strict=True)
    )


def test_capture_through_two_engines_is_that_through_one(servers, weights, spec):
    found = []
    for some in (servers[:1], servers[:2]):
        with pool_of(some) as pool:
            pool.push(weights.items(), version=newest(pool))  # empties the prefix caches
            found.append(pool.generate(ids(12), SAMPLING | {"n": 1}, spec, seed=3))
            version = pool.version
        assert {item.weight_versions for item in found[-1]} == {(version,)}
        time.sleep(1.0)
    one, two = found
    assert same(one, two)
    assert Counter(item.engine for item in one) == {servers[0].url: 12}
    assert {item.engine for item in two} == {server.url for server in servers[:2]}


def test_samples_of_few_prompts_are_spread_and_are_the_same(servers, weights, spec):
    with pool_of(servers[:2]) as pool:
        pool.push(weights.items(), version=newest(pool))
        one = pool.generate(ids(6), SAMPLING | {"n": 2}, spec, seed=4)
        few = pool.generate(ids(1), SAMPLING | {"n": 6, "max_tokens": 32}, spec, seed=4)
    assert [item.prompt_index for item in one] == [place for place in range(6) for _ in range(2)]
    assert len({item.engine for item in few}) == 2
    assert len({tuple(item.token_ids) for item in few}) > 1
    assert [item.prompt_index for item in few] == [0] * 6


def test_a_conversation_stays_on_its_engine(servers, weights, spec):
    with pool_of(servers, limits=PoolLimits()) as pool:
        pool.push(weights.items(), version=newest(pool))
        conversation, homes = ids(5), [set() for _ in range(5)]
        for _ in range(3):
            turns = pool.generate(conversation, SAMPLING | {"n": 1}, spec, conversations=range(5))
            for place, turn in enumerate(turns):
                homes[place].add(turn.engine)
                conversation[place] = [*turn.prompt_ids, *turn.token_ids, 7, 11]
        assert pool.counts["moved"] == 0
    assert [len(home) for home in homes] == [1] * 5
    assert len(set.union(*homes)) > 1


def test_an_engine_joins_with_the_current_version_and_leaves_at_the_cost_of_its_own_requests(servers, weights, spec):
    with pool_of(servers[:2]) as pool:
        version = newest(pool)
        moved = changed(weights, 1.25)
        pool.push(moved, version=version)
        alone = pool.generate(ids(6), SAMPLING | {"n": 1}, spec, seed=5)
        name = pool.join(servers[2].url)
        assert pool.engines[name] == "joining"
        before = pool.generate(ids(6), SAMPLING | {"n": 1}, spec, seed=5)
        assert name not in {item.engine for item in before}
        with pytest.raises(SyncError, match="expected the weights of the last push"):
            pool.catch_up(weights.items())
        pool.require_committed()
        receipt = pool.catch_up(moved)
        assert (receipt.version, receipt.workers) == (version, 1)
        (status,) = engine_of(servers[2].url).call("r3_status", timeout_s=30)
        assert (status["version"], status["state"]) == (version, "idle")
        after = pool.generate(ids(12), SAMPLING | {"n": 1}, spec, seed=5)
        assert name in {item.engine for item in after}
        assert {item.weight_versions for item in after} == {(version,)}
        assert [item.token_ids for item in after.items[:6]] == [item.token_ids for item in alone]

        leaver = threading.Timer(0.3, pool.leave, [name])
        leaver.start()
        found = pool.generate(ids(24), SAMPLING | {"n": 1, "max_tokens": 48}, spec, seed=6)
        leaver.join()
        assert [item.prompt_index for item in found] == [*range(24)]
        assert pool.counts["moved"] <= 1
        assert name not in pool.engines


def test_a_sync_commits_on_all_engines_or_names_the_one_that_stands_still_and_the_next_heals(servers, weights, spec):
    with pool_of(servers) as pool:
        version = newest(pool)
        receipt = pool.push(weights.items(), version=version)
        assert receipt.workers == 3
        with servers[1].stopped():
            start = time.monotonic()
            with pytest.raises(SyncError, match=servers[1].url):
                pool.push(changed(weights, 1.25), version=version + 1)
            assert time.monotonic() - start < 4 * TIMEOUT_S
        time.sleep(TIMEOUT_S)  # its lease
        receipt = pool.push(changed(weights, 1.25), version=version + 2)
        assert receipt.workers == 3
        found = pool.generate(ids(9), SAMPLING | {"n": 1}, spec)
        assert {item.weight_versions for item in found} == {(version + 2,)}
        assert {item.engine for item in found} == {server.url for server in servers}


@pytest.mark.parametrize("point", ["r3_reserve", "r3_load", "r3_commit", "r3_release"])
def test_where_lost_engines_are_removed_a_sync_commits_on_the_rest(point, servers, weights, spec, caplog):
    """One stands still from a call of the sync on."""
    with pool_of(servers, on_lost="remove") as pool:
        version = newest(pool)
        pool.push(weights.items(), version=version)
        adapter, replies = pool.sync.engines[1], pool.sync.engines[1].replies

        def stop_before(method, args, timeout_s):
            if method == point:
                servers[1].signal(signal.SIGSTOP)
            return replies(method, args, timeout_s)

        adapter.replies = stop_before
        try:
            with caplog.at_level(logging.WARNING, logger="r3"):
                receipt = pool.push(changed(weights, 1.25), version=version + 1)
        finally:
            servers[1].signal(signal.SIGCONT)
        assert (receipt.version, pool.version) == (version + 1, version + 1)
        assert pool.engines == {servers[0].url: "serving", servers[2].url: "serving"}
        assert f"goes on without {servers[1].url}, which is lost" in caplog.text
        found = pool.generate(ids(6), SAMPLING | {"n": 1}, spec)
        assert {item.weight_versions for item in found} == {(version + 1,)}
        time.sleep(TIMEOUT_S)  # its lease
        pool.join(servers[1].url)
        receipt = pool.push(weights.items(), version=version + 2)
        assert receipt.workers == 3
        assert set(pool.engines.values()) == {"serving"}


def test_requests_of_a_server_that_stands_still_move(servers, weights, spec):
    with pool_of(servers) as pool:
        version = newest(pool)
        pool.push(weights.items(), version=version)
        with servers[0].stopped():
            found = pool.generate(ids(9), SAMPLING | {"n": 1}, spec, seed=8)
        assert [item.prompt_index for item in found] == [*range(9)]
        assert servers[0].url not in {item.engine for item in found}
        assert pool.engines[servers[0].url] == "lost"
        assert pool.counts["moved"] >= 1
        time.sleep(1.0)
        pool.push(weights.items(), version=version + 1)
        assert set(pool.engines.values()) == {"serving"}, "a sync that commits on it brings an engine back"


def test_a_server_that_is_killed_on_the_way_costs_no_rollout(servers, weights, spec):
    """The last test: it kills one."""
    with pool_of(servers, limits=PoolLimits(max_in_flight=4, health_every_s=0.5), on_lost="remove") as pool:
        version = newest(pool)
        pool.push(weights.items(), version=version)
        killer = threading.Timer(0.5, os.killpg, [servers[2].process.pid, signal.SIGKILL])
        killer.start()
        found = pool.generate(ids(48), SAMPLING | {"n": 2, "max_tokens": 64}, spec, seed=9)
        killer.join()
        assert [item.prompt_index for item in found] == [place for place in range(48) for _ in range(2)]
        assert pool.counts["moved"] >= 1
        assert pool.engines[servers[2].url] == "lost"
        assert pool.push(weights.items(), version=version + 1).workers == 2
        assert servers[2].url not in pool.engines
