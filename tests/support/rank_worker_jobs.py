"""What ranks do in tests of a sync from all of them into r3's own worker extension, and into a real engine."""

import copy
import functools
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import launched_engines
import torch
import torch.distributed as dist
from places import DEMO_MODEL
from rank_sync_jobs import CHUNK_BYTES, Named, ranks, sharded, whole
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.receiving_engine import ReceivingEngine
from r3.parallel import load_expert_parallel, spread_adapters
from r3.weight_sync import GlooTransport, SyncReceipt, WeightSync, named_weights
from trainer_hooks import push_from_all_ranks

ENGINE: list[Any] = []  # of the rank that has it


class Plain(nn.Module):
    """A model of vLLM's interface that holds each tensor of a checkpoint as it is."""

    def __init__(self, named: Named) -> None:
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

    @property
    def held(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, own).detach() for name, own in self.names.items()}


class Extended:
    """r3's worker extension over a `Plain` model, in place of vLLM's worker."""

    def __init__(self, rank: int, size: int, named: Named) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

        from r3.weight_sync.worker import WeightSyncWorker

        one_at_a_time()
        self.model = Plain(named)
        record_metadata_for_reloading(self.model)
        config = copy.copy(EngineArgs(model=str(DEMO_MODEL), enforce_eager=True).create_engine_config())
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.world_size = size
        self._worker = WeightSyncWorker()
        self._worker.rank, self._worker.vllm_config = rank, config
        self._worker.model_runner = SimpleNamespace(
            model=self.model, device=torch.device("cpu"), execute_model=lambda batch: None, kv_caches=[]
        )

    def answer(self, method: str, args: Sequence[Any]) -> dict[str, Any]:
        return getattr(self._worker, method)(*args)


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


def into_extensions() -> int | None:
    """Two syncs into two engines of two workers, by vLLM's loaders and by the plan. Returns the workers' number."""
    weights, made, engines = sharded("softmax"), None, []
    if not dist.get_rank():
        engines = [ReceivingEngine(name, 2) for name in "ab"]
        for engine in engines:
            engine.workers = [Extended(rank, 2, weights) for rank in range(2)]  # pyrefly: ignore
        made = WeightSync(engines, transport=GlooTransport(), chunk_bytes=CHUNK_BYTES, timeout_s=120)
    receipt = None
    for version in (1, 2):
        receipt = push_from_all_ranks(made, weights, version, None, ranks=ranks())
        expected = whole(weights)
        for worker in (worker for engine in engines for worker in engine.workers):
            held = worker.model.held
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], expected[name]) for name in expected)
    return receipt and receipt.workers


@functools.cache
def engine_sync() -> WeightSync | None:
    if not ENGINE:
        return None
    return WeightSync(ENGINE[0], transport="gloo", dtype=torch.bfloat16, chunk_bytes=1 << 18, timeout_s=120)


def _push(weights: Named) -> SyncReceipt | None:
    made = engine_sync()
    return push_from_all_ranks(made, weights, 0 if made is None else (made.version or 0) + 1, None, ranks=ranks())


def into_engine(scale: float) -> SyncReceipt | None:
    """A sync of the demo's model, with its last layer's weights times `scale`."""
    return _push(launched_engines.weights(scale))


def demo(adapted: Sequence[str], *, spread: bool) -> Named:
    """The demo's model with adapters of `adapted`, merged; `spread`: each rank holds its share of the experts."""
    from expert_parallel_jobs import with_lora

    if spread:
        model: Any = load_expert_parallel(DEMO_MODEL, dist.get_world_size(), param_dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    if adapted:
        model = with_lora(model, adapted)
        if spread:
            spread_adapters(model)
    return named_weights(model)


def experts_into_engine(adapted: Sequence[str]) -> SyncReceipt | None:
    return _push(demo(adapted, spread=True))


def close_engine_sync() -> None:
    ranks().close()
    if (made := engine_sync()) is not None:
        made.close()
    # The rank that is the tests' own process has others later.
    for kept in (ranks, engine_sync, launched_engines.model):
        kept.cache_clear()
