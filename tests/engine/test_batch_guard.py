"""A request that gets to the workers during a sync, past the engine's pause: it ends the engine, and is not answered.

python -m pytest tests/engine/test_batch_guard.py -m gpu        # with CUDA graphs, which hold addresses
"""

import contextlib

import pytest
from async_engine import Running
from sync_helpers import following, prompts

from r3.capture import engine_kwargs
from r3.weight_sync import WeightSync
from r3.weight_sync.transports.files import FilesTransport


class Interrupted(FilesTransport):
    """Calls `between` when most chunks are on their way."""

    between = None

    def publish(self, index, chunk):
        if self.between is not None and index == 6:
            self.between()
        return super().publish(index, chunk)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "graphs"])
def running(request, demo_config):
    settings = engine_kwargs(demo_config) | {
        "enforce_eager": not request.param,
        "worker_extension_cls": "engine_worker.BreakableWorker",
    }
    with contextlib.closing(Running(settings)) as made:
        made.graphs = request.param
        made.reference = made.greedy()
        yield made


@pytest.fixture
def moved(weights):
    return {name: tensor + 0.02 * tensor.std() for name, tensor in weights.items()}


def asked_past_the_pause(running, sync_into, weights):
    """A sync of `weights` that is past half when someone resumes the engine and asks it: what is answered."""
    answers = []

    def ask():
        running.run(running.llm.resume_generation())
        answers.append(running.run(running.one(prompts()[0])))

    sync_into.transport.between = ask
    sync_into.push(weights.items(), version=following(sync_into))
    return answers[0]


@pytest.fixture
def sync(running):
    transport = Interrupted()
    with contextlib.closing(WeightSync(running.llm, transport=transport, chunk_bytes=1 << 19, timeout_s=60)) as made:
        made.transport = transport
        yield made


@pytest.mark.engine
@pytest.mark.long
def test_a_request_past_the_pause_ends_the_engine_and_is_not_answered(running, weights, moved, sync):
    from vllm.v1.engine.exceptions import EngineDeadError

    sync.push(weights.items(), version=following(sync))
    assert running.greedy() == running.reference
    if running.graphs:
        # Without the guard there is an answer, of weights that never were a version.
        running.run(running.llm.collective_rpc("r3_test_remove", args=("batch guard",)))
        between = asked_past_the_pause(running, sync, moved)
        running.run(running.llm.collective_rpc("r3_test_restore"))
        sync.transport.between = None
        after = running.greedy()
        assert between not in (running.reference[0][0], after[0][0]), "not half-loaded: nothing is shown"
        sync.push(weights.items(), version=following(sync))
        assert running.greedy() == running.reference
    with pytest.raises(EngineDeadError):
        asked_past_the_pause(running, sync, moved)
    assert running.llm.errored
