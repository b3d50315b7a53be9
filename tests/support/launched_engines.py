"""What ranks do in tests/engine/test_launched_engines.py: trainers with a vLLM engine in their own process."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from places import DEMO_MODEL
from sync_helpers import greedy
from torch import nn
from transformers import AutoModelForCausalLM

import r3
from r3.parallel import RankBarrier, make_mesh, shard_parameters
from r3.weight_sync import InProcessTransport, WeightSync, gathered, named_weights
from trainer_hooks import push_from_all_ranks

WORDS = dict(count=2, tokens=12)


@functools.cache
def engine(tensor_parallel_size: int) -> Any:
    """This rank's `LLM`, with the arguments of a trainer that colocates it."""
    from vllm import LLM

    config = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(DEMO_MODEL)})
    launched = {
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "external_launcher",
        "seed": dist.get_rank() // tensor_parallel_size,
        "worker_extension_cls": "engine_worker.BreakableWorker",
        "kv_cache_memory_bytes": 1 << 26,
    }
    return LLM(**r3.capture.engine_kwargs(config) | launched)


@functools.cache
def sync(tensor_parallel_size: int) -> WeightSync:
    return WeightSync(engine(tensor_parallel_size), dtype=torch.bfloat16, chunk_bytes=1 << 20, timeout_s=60)


@functools.cache
def model() -> nn.Module:
    """The trainer's model, sharded over all ranks."""
    made = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return shard_parameters(made, make_mesh("cpu"), param_dtype=torch.float32)


def weights(scale: float = 1.0) -> list:
    """The checkpoint, with the last layer's weights times `scale`."""
    with torch.no_grad():
        for parameter in model().model.layers[-1].parameters():
            parameter.mul_(scale)
    return named_weights(model())


def push(tensor_parallel_size: int, scale: float = 1.0) -> dict[str, Any]:
    made = sync(tensor_parallel_size)
    receipt = push_from_all_ranks(made, weights(scale), (made.version or 0) + 1, RankBarrier(timeout_s=30))
    return {"version": receipt.version, "digest": receipt.digest, "in_process": in_process(made)}


def in_process(made: WeightSync) -> bool:
    return isinstance(made._transport, InProcessTransport)


def says(tensor_parallel_size: int) -> list:
    return greedy(engine(tensor_parallel_size), **WORDS)


def as_loaded_moved_and_back(tensor_parallel_size: int) -> dict[str, Any]:
    """What the engine says: as it was loaded, and after syncs of the same, of other, and of the first weights."""
    said = {"loaded": says(tensor_parallel_size)}
    receipts = [push(tensor_parallel_size)]
    said["same"] = says(tensor_parallel_size)
    receipts.append(push(tensor_parallel_size, 2.0))
    said["moved"] = says(tensor_parallel_size)
    # The trainer goes on: the engine must not share its memory.
    weights(0.5)
    said["trained on"] = says(tensor_parallel_size)
    receipts.append(push(tensor_parallel_size))
    said["back"] = says(tensor_parallel_size)
    return {"said": said, "receipts": receipts}


def asleep(tensor_parallel_size: int) -> bool:
    """A sync as a trainer does it that lets its engine sleep: the KV cache wakes after it."""
    before = says(tensor_parallel_size)
    llm = engine(tensor_parallel_size)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    push(tensor_parallel_size)
    llm.wake_up(tags=["kv_cache"])
    return says(tensor_parallel_size) == before


def fails_on_the_last_rank(tensor_parallel_size: int) -> None:
    """The worker of one rank fails when it seals."""
    llm, last = engine(tensor_parallel_size), dist.get_rank() == dist.get_world_size() - 1
    if last:
        llm.collective_rpc("r3_test_fail", args=("r3_seal",))
    try:
        push(tensor_parallel_size)
    finally:
        if last:
            llm.collective_rpc("r3_test_mend", args=("r3_seal",))


def refused(tensor_parallel_size: int) -> dict[str, Any]:
    """State after a failed sync: cause on this rank, what a request gets, and whether a sync heals it."""
    made = sync(tensor_parallel_size)
    try:
        says(tensor_parallel_size)
        answer = "answered"
    except r3.SyncError as error:
        answer = str(error)
    versions = [made.version, push(tensor_parallel_size)["version"]]
    return {"poisoned": answer, "versions": versions, "said": says(tensor_parallel_size)}


def whole(tensor_parallel_size: int) -> int:
    """A push on this rank alone of weights that no rank shares."""
    made = sync(tensor_parallel_size)
    held = [(name, gathered(weight)) for name, weight in weights()]
    return made.push(held, version=(made.version or 0) + 1).workers
