"""What ranks do in tests/engine/test_launched_engines.py: trainers with a vLLM engine in their own process."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from places import DEMO_MODEL
from sync_helpers import greedy, prompts
from torch import nn
from transformers import AutoModelForCausalLM

import r3
from r3.diagnostics import compare_routing
from r3.parallel import RankBarrier, make_mesh, shard_parameters
from r3.weight_sync import InProcessTransport, WeightSync, gathered, named_weights
from trainer_hooks import push_from_all_ranks

WORDS = dict(count=2, tokens=12)


class Layout(NamedTuple):
    """vLLM's arguments: a rank of the engine has a slice of every expert, or with expert parallelism whole ones."""

    tensor_parallel_size: int
    enable_expert_parallel: bool = False


@functools.cache
def engine(layout: Layout) -> Any:
    """This rank's `LLM`, with the arguments of a trainer that colocates it."""
    from vllm import LLM

    config = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(DEMO_MODEL)})
    launched = {
        **layout._asdict(),
        "distributed_executor_backend": "external_launcher",
        "seed": dist.get_rank() // layout.tensor_parallel_size,
        "worker_extension_cls": "engine_worker.BreakableWorker",
        "kv_cache_memory_bytes": 1 << 26,
    }
    if torch.cuda.is_available():
        # Ranks that share a GPU cannot open each other's memory.
        launched |= {"enable_sleep_mode": True, "disable_custom_all_reduce": True}
    elif dist.get_rank() == 0:
        # vLLM 0.30 names the shared memory of such engines alike in all runs, and cannot start where a run that was
        # killed has left its own.
        for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
            left.unlink()
    dist.barrier()
    return LLM(**r3.capture.engine_kwargs(config) | launched)


@functools.cache
def sync(layout: Layout) -> WeightSync:
    return WeightSync(engine(layout), dtype=torch.bfloat16, chunk_bytes=1 << 20, timeout_s=60)


@functools.cache
def model() -> nn.Module:
    """The trainer's model, sharded over all ranks."""
    made = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return shard_parameters(made, make_mesh("cuda" if torch.cuda.is_available() else "cpu"), param_dtype=torch.float32)


def weights(scale: float = 1.0) -> list:
    """The checkpoint, with the last layer's weights times `scale`."""
    with torch.no_grad():
        for parameter in model().model.layers[-1].parameters():
            parameter.mul_(scale)
    return named_weights(model())


def push(layout: Layout, scale: float = 1.0) -> dict[str, Any]:
    made = sync(layout)
    receipt = push_from_all_ranks(made, weights(scale), (made.version or 0) + 1, RankBarrier(timeout_s=30))
    return {"version": receipt.version, "digest": receipt.digest, "in_process": in_process(made)}


def in_process(made: WeightSync) -> bool:
    return isinstance(made._transport, InProcessTransport)


def says(layout: Layout) -> list:
    return greedy(engine(layout), **WORDS)


def as_loaded_moved_and_back(layout: Layout) -> dict[str, Any]:
    """What the engine says: as it was loaded, and after syncs of the same, of other, and of the first weights."""
    said = {"loaded": says(layout)}
    receipts = [push(layout)]
    said["same"] = says(layout)
    receipts.append(push(layout, 2.0))
    said["moved"] = says(layout)
    # The trainer goes on: the engine must not share its memory.
    weights(0.5)
    said["trained on"] = says(layout)
    receipts.append(push(layout))
    said["back"] = says(layout)
    return {"said": said, "receipts": receipts}


def asleep(layout: Layout) -> bool:
    """A sync as a trainer does it that lets its engine sleep: the KV cache wakes after it."""
    before = says(layout)
    llm = engine(layout)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    push(layout)
    llm.wake_up(tags=["kv_cache"])
    return says(layout) == before


def fails_on_the_last_rank(layout: Layout) -> None:
    """The worker of one rank fails when it seals."""
    llm, last = engine(layout), dist.get_rank() == dist.get_world_size() - 1
    if last:
        llm.collective_rpc("r3_test_fail", args=("r3_seal",))
    try:
        push(layout)
    finally:
        if last:
            llm.collective_rpc("r3_test_mend", args=("r3_seal",))


def refused(layout: Layout) -> dict[str, Any]:
    """State after a failed sync: cause on this rank, what a request gets, and whether a sync heals it."""
    made = sync(layout)
    try:
        says(layout)
        answer = "answered"
    except r3.SyncError as error:
        answer = str(error)
    versions = [made.version, push(layout)["version"]]
    return {"poisoned": answer, "versions": versions, "said": says(layout)}


def whole(layout: Layout) -> int:
    """A push on this rank alone of weights that no rank shares."""
    made = sync(layout)
    held = [(name, gathered(weight)) for name, weight in weights()]
    return made.push(held, version=(made.version or 0) + 1).workers


def differing_rows(layout: Layout) -> float:
    """The share of (token, layer) pairs in which a trainer on one device chooses other experts than the engine did."""
    from vllm import SamplingParams

    trainer = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16)
    replay = r3.attach(trainer)
    sampling = SamplingParams(max_tokens=48, logprobs=0, ignore_eos=True, seed=0)
    outputs = engine(layout).generate(prompts(), sampling, use_tqdm=False)
    batch = r3.capture.collect(outputs, replay.spec).batch(0)
    with torch.no_grad(), r3.record(trainer) as recorder:
        trainer(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    own, routing = recorder.routing, batch.routing
    return compare_routing(own.expert_ids, routing.expert_ids, routing.valid)["differing_rows"]
