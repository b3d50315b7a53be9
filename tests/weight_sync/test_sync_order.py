"""What a sync asks of an engine, in which order, and what is left when it ends in the middle."""

import contextlib
import random
import signal
import time
from functools import partial

import pytest
import torch
from sync_helpers import following, greedy

import r3
from r3.weight_sync.engines import engine_of
from r3.weight_sync.engines.deadline import in_thread
from r3.weight_sync.sender.chunking import OutgoingWeights

pytestmark = pytest.mark.engine


def test_calls_to_an_engine_may_overlap(engine):
    """A sync that ends early gives up while a call is on its way. vLLM's client writes to one socket, unguarded."""
    adapters = [engine_of(engine), engine_of(engine)]
    text = "x" * 200_000
    done = [in_thread(partial(adapters[n % 2].call, "r3_test_length", text, timeout_s=60)) for n in range(64)]
    assert {reply["length"] for future in done for reply in future.result()} == {len(text)}


def test_caches_are_emptied_once_no_batch_can_run(engine, weights, reference, sync, monkeypatch):
    """One that ran after that and before the weights change would fill them anew."""
    adapter, said = sync.engines[0], []

    def watched(name):
        call = getattr(adapter, name)

        def noted(*args):
            said.append(args[0] if name == "replies" else name)
            return call(*args)

        monkeypatch.setattr(adapter, name, noted)

    for name in ("replies", "pause", "resume", "reset_caches", "set_weight_version"):
        watched(name)
    sync.push(weights.items(), version=following(sync))
    order = list(dict.fromkeys(said))
    assert order == [
        *("r3_reserve", "pause", "r3_begin", "reset_caches", "r3_load"),
        *("r3_seal", "r3_commit", "set_weight_version", "resume", "r3_release"),
    ]
    assert greedy(engine) == reference


def test_digests_that_are_taken_while_an_engine_is_waited_for_are_those_of_the_chunks(
    engine, weights, reference, sync, monkeypatch
):
    """As they are of what lies on a GPU: all while requests run to their end, none twice."""
    expected = sync.push(weights.items(), version=following(sync))
    taken, by_then = [], []
    pause = sync.engines[0].pause

    def slow_to_pause(timeout_s):
        time.sleep(1.0)
        by_then.append(len(taken))
        return pause(timeout_s)

    def lying(outgoing):
        for name, tensor in weights.items():
            taken.append(name)
            yield name, tensor

    monkeypatch.setattr(OutgoingWeights, "gpu_resident", lying)
    monkeypatch.setattr(sync.engines[0], "pause", slow_to_pause)
    receipt = sync.push(weights.items(), version=following(sync))
    assert by_then == [len(weights)] == [len(taken)]
    assert (receipt.digest, receipt.bytes) == (expected.digest, expected.bytes)
    wrong = {name: t * torch.nan if name == taken[0] else t for name, t in weights.items()}
    monkeypatch.setattr(OutgoingWeights, "gpu_resident", lambda outgoing: iter(wrong.items()))
    with pytest.raises(r3.SyncError, match=rf"1 tensors hold NaN or infinity:\s+{taken[0]}"):
        sync.push(wrong.items(), version=following(sync))
    monkeypatch.undo()
    sync.push(weights.items(), version=following(sync))
    assert greedy(engine) == reference


def test_a_cache_that_cannot_be_emptied_leaves_the_engine_as_it_was(engine, weights, reference, sync, monkeypatch):
    def refuse(timeout_s):
        raise r3.SyncError("requests hold blocks of it")

    moved = {name: t + 0.01 * t.std() for name, t in weights.items()}
    with monkeypatch.context() as patch:
        patch.setattr(sync.engines[0], "reset_caches", refuse)
        with pytest.raises(r3.SyncError, match="requests hold blocks of it"):
            sync.push(moved.items(), version=following(sync))
    sync.require_committed()
    assert greedy(engine) == reference
    sync.push(moved.items(), version=following(sync))
    assert greedy(engine) != reference
    sync.push(weights.items(), version=following(sync))
    assert greedy(engine) == reference


@pytest.mark.long
def test_a_sync_that_is_interrupted_at_any_moment_is_healed_by_the_next(engine, weights, reference, sync):
    """As by Ctrl-C, or by SIGTERM where it raises: calls to the engine are on their way then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    sync.push(weights.items(), version=following(sync))
    whole_s = sync.push(weights.items(), version=following(sync)).seconds
    version, interrupted, of = sync.version, 0, random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            version += 1
            signal.setitimer(signal.ITIMER_REAL, of.uniform(0, whole_s))
            # Python's own locks make another error of one that comes within them.
            with contextlib.suppress(KeyboardInterrupt, RuntimeError):
                sync.push(weights.items(), version=version)
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted -= 1
            interrupted, version = interrupted + 1, version + 1
            sync.push(weights.items(), version=version)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    assert greedy(engine) == reference
