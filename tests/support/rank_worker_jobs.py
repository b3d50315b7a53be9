"""What ranks do in tests of a sync from all of them: four trainers, and engines whose workers are real but for vLLM."""

import copy
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from parallel_jobs import build
from places import DEMO_MODEL
from torch import nn

from r3.parallel import make_mesh, shard_parameters
from r3.weight_sync import Engine, GlooTransport, SyncRanks, SyncReceipt, WeightSync, gathered, named_weights

CHUNK_BYTES = 1 << 15


class Plain(nn.Module):
    """A model of vLLM's interface that holds each tensor of a checkpoint as it is."""

    def __init__(self, named: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self.names = {name: f"weight_{number}" for number, (name, _) in enumerate(named)}
        for name, weight in named:
            made = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype), requires_grad=False)
            setattr(self, self.names[name], made)

    def load_weights(self, weights):
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        for name, weight in weights:
            parameter = getattr(self, self.names[name])
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)

    def held(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, own).detach() for name, own in self.names.items()}


class ThreadEngine(Engine):
    """An engine of two workers: r3's own extension, each in a thread of this process."""

    remedy = ""

    def __init__(self, name: str, named: Sequence[tuple[str, Any]], workers: int = 2) -> None:
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

        from r3.weight_sync.worker import WeightSyncWorker

        one_at_a_time()
        self.name = name
        self.serves = True
        self._threads = [ThreadPoolExecutor(1) for _ in range(workers)]
        self.workers = []
        for rank in range(workers):
            model = Plain(named)
            record_metadata_for_reloading(model)
            worker = WeightSyncWorker()
            config = copy.copy(engine_config())
            config.parallel_config = copy.copy(config.parallel_config)
            config.parallel_config.world_size = workers
            worker.rank, worker.vllm_config = rank, config
            worker.model_runner = SimpleNamespace(
                model=model, device=torch.device("cpu"), execute_model=lambda batch: None, kv_caches=[]
            )
            self.workers.append(worker)

    def replies(self, method, args, timeout_s):
        calls = [
            thread.submit(getattr(worker, method), *args)
            for thread, worker in zip(self._threads, self.workers, strict=True)
        ]
        return [call.result(timeout_s) for call in calls]

    def pause(self, timeout_s):
        served, self.serves = self.serves, False
        return served

    def resume(self, timeout_s):
        self.serves = True

    def refuse(self, cause): ...

    def reset_caches(self, timeout_s): ...

    def set_weight_version(self, version, timeout_s): ...


@functools.cache
def one_at_a_time() -> None:
    """vLLM's reload is for one thread of a process. Chunks are received beside it, as always."""
    from r3.weight_sync.worker.engine_models import EngineReload

    lock = threading.RLock()

    def locked(method):
        @functools.wraps(method)
        def call(*args, **options):
            with lock:
                return method(*args, **options)

        return call

    for name in ("misfits", "begin", "whole_targets", "load", "missing", "finish", "commit", "abandon"):
        setattr(EngineReload, name, locked(getattr(EngineReload, name)))


@functools.cache
def engine_config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(DEMO_MODEL), enforce_eager=True).create_engine_config()


@functools.cache
def model(family: str = "softmax", kind: str = "fsdp") -> nn.Module:
    made, _ = build(family, tied=kind == "tied")
    return shard_parameters(made, make_mesh("cpu"), param_dtype=torch.float32)


def whole(weights: Sequence[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: gathered(weight).clone() for name, weight in weights}


@functools.cache
def ranks(timeout_s: float = 20.0) -> SyncRanks:
    return SyncRanks(timeout_s=timeout_s)


@functools.cache
def sync(family: str = "softmax", senders: str = "all", timeout_s: float = 20.0) -> WeightSync | None:
    if dist.get_rank():
        return None
    engines = [ThreadEngine(name, named_weights(model(family))) for name in "ab"]
    return WeightSync(engines, transport=GlooTransport(), chunk_bytes=CHUNK_BYTES, timeout_s=timeout_s, senders=senders)


def push(weights, made: WeightSync | None, of: SyncRanks, version: int | None = None) -> SyncReceipt | None:
    if made is None:
        of.take_part(weights)
        return None
    return made.push(weights, version=version or (made.version or 0) + 1, ranks=of)


def all_equal(family: str = "softmax", senders: str = "all") -> dict[str, Any]:
    """Two syncs: what workers hold against what every rank gathers, and what each rank sent."""
    made, found = sync(family, senders), []
    for step in range(2):
        with torch.no_grad():
            for parameter in model(family).parameters():
                parameter.mul_(1 + step)
        weights = named_weights(model(family))
        receipt = push(weights, made, ranks())
        expected = whole(weights)
        if made is not None:
            for engine in made.engines:
                for worker in engine.workers:
                    held = worker.model_runner.model.held()
                    assert held.keys() == expected.keys()
                    assert all(torch.equal(held[name], expected[name]) for name in held), "other weights"
            found.append(receipt)
    return {"receipts": found}
