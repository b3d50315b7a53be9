"""Engines that a sync removes are not in the pool any more, however the sync ends."""

import pytest
import torch
from simulated_servers import SimulatedAdapter, SimulatedClient, SimulatedServer

from r3.errors import SyncError
from r3.pool import EnginePool
from r3.weight_sync import WeightSync


class _Failing(SimulatedAdapter):
    fails = ""
    silent = False  # to what gives a sync up, too

    def replies(self, method, args, timeout_s):
        self._may_fail(method)
        return super().replies(method, args, timeout_s)

    def resume(self, timeout_s):
        self._may_fail("resume")
        super().resume(timeout_s)

    def _may_fail(self, what):
        if what == self.fails or (self.silent and what == "r3_abort"):
            raise SyncError(f"{self.name}: no answer to {what}")


@pytest.fixture
def engines():
    return [_Failing(SimulatedServer(name)) for name in "xyz"]


@pytest.fixture
def pool(engines):
    sync = WeightSync(engines, transport="files", on_lost="remove", timeout_s=5.0)
    with EnginePool(sync, client=lambda adapter: SimulatedClient(adapter.server, 0.0)) as made:
        yield made


def push(pool, version):
    return pool.push([("number", torch.tensor([float(version)]))], version=version)


def names(pool):
    return {engine.name for engine in pool.sync.engines}


def test_an_engine_that_a_sync_removed_before_it_failed_leaves_the_pool_and_can_join_again(pool, engines):
    push(pool, 1)
    engines[0].fails, engines[1].fails, engines[2].fails = "r3_commit", "resume", "resume"
    with pytest.raises(SyncError, match="no answer to resume"):
        push(pool, 2)
    assert pool.engines.keys() == names(pool) == {"http://y", "http://z"}
    for engine in engines:
        engine.fails = ""
    pool.join(_Failing(engines[0].server))
    assert push(pool, 3).workers == 3
    assert pool.engines == dict.fromkeys(["http://y", "http://z", "http://x"], "serving")


def test_an_engine_that_may_stand_still_gets_no_request_until_a_sync_commits_on_it(engines):
    sync = WeightSync(engines, transport="files", timeout_s=5.0)
    with EnginePool(sync, client=lambda adapter: SimulatedClient(adapter.server, 0.0)) as pool:
        push(pool, 1)
        engines[1].fails = "r3_begin"
        engines[1].silent = True
        with pytest.raises(SyncError, match="no answer to r3_begin"):
            push(pool, 2)
        assert pool.engines == {"http://x": "serving", "http://y": "joining", "http://z": "serving"}
        rollouts = pool.generate([[1, 2, 3]] * 6, {"n": 1, "max_tokens": 2, "logprobs": 0}, None)
        assert {rollout.engine for rollout in rollouts} == {"http://x", "http://z"}
        engines[1].fails, engines[1].silent = "", False
        engines[1].server.worker._until = 0.0  # the lease of the sync that it did not hear the end of is over
        assert push(pool, 3).workers == 3
        assert set(pool.engines.values()) == {"serving"}


def test_a_sync_that_fails_before_it_begins_removes_no_engine_that_an_earlier_one_has_removed(pool, engines):
    engines[0].fails = "r3_commit"
    assert push(pool, 1).workers == 2
    engines[0].fails = ""
    pool.join(engines[0])
    with pytest.raises(SyncError, match="got nothing"):
        pool.push([], version=2)
    assert pool.engines.keys() == names(pool) == {"http://x", "http://y", "http://z"}
    assert push(pool, 3).workers == 3
