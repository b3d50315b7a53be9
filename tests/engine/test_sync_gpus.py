"""Engines whose workers are on several GPUs: all get the trainer's weights, from one of these GPUs.

python -m pytest tests/engine/test_sync_gpus.py -m gpu        # two GPUs
"""

import contextlib

import pytest
import torch
from async_engine import Running
from receivers import for_nccl
from sync_helpers import following

from r3.capture import engine_kwargs
from r3.weight_sync import WeightSync

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.engine]

PARALLEL = {"tensor": {"tensor_parallel_size": 2}, "data": {"data_parallel_size": 2}}


@pytest.fixture(scope="module", params=PARALLEL)
def running(request, demo_config):
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
