"""A sync to several engines, of which one does not answer from some call on; engines that are added and removed."""

import logging

import pytest
import torch
from plain_workers import PlainEngine
from ranks import Ranks

from r3 import EngineLostError, SyncError
from r3.pool import EnginePool
from r3.pool.clients import EngineClient
from r3.weight_sync import WeightSync
from trainer_hooks import push_from_all_ranks

BEFORE = ("r3_reserve", "pause", "r3_begin", "caches", "r3_load", "r3_seal")
AFTER = ("r3_commit", "label", "resume", "r3_release")
WEIGHTS = {f"layer.{n}": torch.full((4, 4), float(n)) for n in range(4)}


def engines(lost_before: str = ""):
    return [PlainEngine("a"), PlainEngine("b", lost_before), PlainEngine("c")]


def committed(engine, version: int) -> bool:
    return (engine.version, engine.state, engine.cause, engine.serves) == (version, "idle", "", True)


@pytest.mark.parametrize("point", BEFORE)
def test_before_the_commit_a_lost_engine_is_removed_and_the_same_push_commits_on_the_rest(point, caplog):
    a, b, c = engines(point)
    sync = WeightSync([a, b, c], on_lost="remove", timeout_s=5)
    with caplog.at_level(logging.WARNING, logger="r3"), pytest.raises(EngineLostError, match="b did not answer"):
        sync.push(WEIGHTS.items(), version=1)
    assert "goes on without b, which is lost: b: no answer to r3_abort" in caplog.text
    assert [engine.name for engine in sync.engines] == ["a", "c"]
    assert sync.push(WEIGHTS.items(), version=1).workers == 2
    assert committed(a, 1)
    assert committed(c, 1)
    assert b.version is None
    assert sync.lost == {}


@pytest.mark.parametrize("point", AFTER)
def test_from_the_commit_on_a_sync_goes_on_without_a_lost_engine(point, caplog):
    a, b, c = engines(point)
    sync = WeightSync([a, b, c], on_lost="remove", timeout_s=5)
    with caplog.at_level(logging.WARNING, logger="r3"):
        receipt = sync.push(WEIGHTS.items(), version=1)
    assert receipt.version == sync.version == 1
    assert receipt.workers == 2
    assert list(sync.lost) == ["b"]
    assert f"goes on without b, which is lost: b: no answer to {point}" in caplog.text
    assert committed(a, 1)
    assert committed(c, 1)
    assert sync.push(WEIGHTS.items(), version=2).workers == 2
    assert not b.serves or point == "r3_release"


@pytest.mark.parametrize("point", BEFORE + AFTER)
def test_by_default_a_lost_engine_fails_the_sync_by_name_and_the_next_heals(point):
    a, b, c = engines(point)
    sync = WeightSync([a, b, c], timeout_s=5)
    with pytest.raises(SyncError, match=f"b: no answer to {point}") as caught:
        sync.push(WEIGHTS.items(), version=1)
    assert not isinstance(caught.value, EngineLostError)
    assert len(sync.engines) == 3
    b.lost, b.lost_before = False, ""
    assert sync.push(WEIGHTS.items(), version=2).workers == 3
    assert all(committed(engine, 2) for engine in (a, b, c))


@pytest.mark.parametrize("point", BEFORE[:4])
def test_before_a_weight_went_out_the_engines_that_answer_serve_again(point):
    """A silent engine kept the others paused, while nothing said that they were."""
    a, b, c = engines(point)
    sync = WeightSync([a, b, c], timeout_s=5)
    with pytest.raises(SyncError, match=f"b: no answer to {point}"):
        sync.push(WEIGHTS.items(), version=1)
    assert sync.poisoned is None
    assert a.serves
    assert c.serves
    assert sync.standing == {"b"}
    b.lost, b.lost_before = False, ""
    assert sync.push(WEIGHTS.items(), version=2).workers == 3
    assert sync.standing == set()


def test_when_all_engines_are_lost_none_is_removed():
    lost = [PlainEngine(name, "r3_load") for name in "ab"]
    sync = WeightSync(lost, on_lost="remove", timeout_s=5)
    with pytest.raises(SyncError, match="no answer to r3_load") as caught:
        sync.push(WEIGHTS.items(), version=1)
    assert not isinstance(caught.value, EngineLostError)
    assert sync.engines == tuple(lost)


def test_a_failure_of_the_weights_removes_nobody():
    sync = WeightSync(engines(), on_lost="remove", timeout_s=5)
    with pytest.raises(SyncError, match="NaN"):
        sync.push((WEIGHTS | {"layer.1": torch.full((4, 4), torch.nan)}).items(), version=1)
    assert len(sync.engines) == 3


def test_after_a_commit_that_is_not_the_same_everywhere_nothing_is_pushed_again():
    """The others may have committed this version, and would refuse it."""
    a, b, c = engines("r3_abort")
    sync = WeightSync([a, b, c], on_lost="remove", timeout_s=5)
    a.replies_after_commit = {"digest": 1}
    with pytest.raises(SyncError, match="on every worker, got") as caught:
        sync.push(WEIGHTS.items(), version=1)
    assert not isinstance(caught.value, EngineLostError)
    assert [engine.name for engine in sync.engines] == ["a", "c"]
    a.replies_after_commit = {}
    assert sync.push(WEIGHTS.items(), version=2).workers == 2


def test_engines_are_added_and_removed_by_name():
    a, b, c = engines()
    sync = WeightSync([a, PlainEngine("a")], timeout_s=5)
    assert [engine.name for engine in sync.engines] == ["a", "a #2"]
    sync.push(WEIGHTS.items(), version=1)
    assert sync.add(b) is b
    assert sync.push(WEIGHTS.items(), version=2).workers == 3
    sync.remove("a #2")
    with pytest.raises(SyncError, match="no engine is called 'a #2'"):
        sync.remove("a #2")
    c.lost = True
    with pytest.raises(SyncError, match="c: no answer to r3_status"):
        sync.add(c)
    assert [engine.name for engine in sync.engines] == ["a", "b"]
    sync.remove("a")
    with pytest.raises(SyncError, match="b is the only engine"):
        sync.remove("b")
    with pytest.raises(SyncError, match="expected one of raise, remove, got 'drop'"):
        WeightSync(a, on_lost="drop")


def test_an_added_engine_gets_the_committed_weights_and_no_others():
    a, b, _ = engines()
    sync = WeightSync(a, timeout_s=5)
    receipt = sync.push(WEIGHTS.items(), version=3)
    sync.add(b)
    other = WEIGHTS | {"layer.0": torch.ones(4, 4)}
    with pytest.raises(SyncError, match="expected the weights of the last push"):
        sync.push_to(["b"], other.items(), like=receipt)
    assert b.version is None
    sync.require_committed()
    asked = len(a.asked)
    assert sync.push_to(["b"], WEIGHTS.items(), like=receipt).digest == receipt.digest
    assert committed(b, 3)
    assert len(a.asked) == asked, "an engine that has the version was asked for something"
    assert sync.push(WEIGHTS.items(), version=4).workers == 2


class Idle(EngineClient):
    def __init__(self, adapter) -> None:
        self.name = adapter.name

    def start(self, request):
        raise NotImplementedError

    async def cause_of_death(self, timeout_s):
        return None


@pytest.mark.parametrize("point", BEFORE + AFTER)
def test_a_pool_commits_on_the_rest_by_itself(point):
    a, b, c = engines(point)
    with EnginePool(WeightSync([a, b, c], on_lost="remove", timeout_s=5), client=Idle) as pool:
        assert pool.push(WEIGHTS.items(), version=1).version == pool.version == 1
        assert pool.engines == {"a": "serving", "c": "serving"}
        assert committed(a, 1)
        assert committed(c, 1)


def test_a_pool_gives_a_joining_engine_the_version_before_it_serves():
    a, b, c = engines()
    with EnginePool(WeightSync([a, c], timeout_s=5), client=Idle) as pool:
        assert pool.engines == {"a": "serving", "c": "serving"}
        assert pool.catch_up(WEIGHTS.items()) is None
        pool.push(WEIGHTS.items(), version=5)
        assert pool.join(b) == "b"
        assert pool.engines["b"] == "joining"
        assert pool.catch_up(WEIGHTS.items()).version == 5
        assert pool.engines["b"] == "serving"
        pool.leave("a")
        assert pool.engines == {"c": "serving", "b": "serving"}
        pool.join(a)
        assert pool.engines["a"] == "serving", "it has the version already"


def push_with_one_lost(point: str) -> tuple:
    """On rank 0 the engines; the other rank gathers."""
    import torch.distributed as dist

    from r3.parallel import RankBarrier

    first = dist.get_rank() == 0
    sync = WeightSync(engines(point), on_lost="remove", timeout_s=10) if first else None
    receipt = push_from_all_ranks(sync, [*WEIGHTS.items()], 1, RankBarrier(timeout_s=20))
    return (receipt.version, receipt.workers) if receipt is not None else (None, None)


@pytest.mark.long
def test_all_ranks_push_again_to_the_engines_that_are_left():
    ranks = Ranks(2)
    try:
        for point in ("r3_reserve", "r3_load", "r3_commit"):
            assert ranks.all(push_with_one_lost, point, timeout_s=60)[0] == (1, 2)
    finally:
        ranks.close()
