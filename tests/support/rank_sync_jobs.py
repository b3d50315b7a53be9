"""What ranks do in tests of a sync from all of them: four trainers with shards, and two engines of two workers."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_jobs import build
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from benchmarks import sharded_sync
from benchmarks.receiving_engine import ReceivingEngine
from r3 import SyncError
from r3.parallel import make_mesh, shard_parameters
from r3.weight_sync import GlooTransport, SyncRanks, WeightSync, gather_all, gathered, named_weights, quantised
from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.sender.rank_part import RankPart
from r3.weight_sync.weights.gathering import Gathering
from r3.weight_sync.weights.lazy import as_source
from r3.weight_sync.weights.row_blocks import gathered_block, row_blocks
from trainer_hooks import push_from_all_ranks

CHUNK_BYTES = 1 << 16
LIMIT_S = 4.0
Named = Sequence[tuple[str, Any]]


def whole(weights: Named) -> dict[str, torch.Tensor]:
    return {name: gathered(weight).detach().clone() for name, weight in weights}


@functools.cache
def sharded(kind: str) -> Named:
    """Weights of a sharded model."""
    name, _, how = kind.partition(", ")
    model, _ = build(
        {"softmax": "softmax", "biases": "sigmoid, bias, groups", "gpt-oss": "gpt-oss"}[name], tied=how == "tied"
    )
    if how == "lora":
        model = with_adapters(model)
    if how == "replicated":
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "lora":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = shard_parameters(model, make_mesh("cpu"), param_dtype=torch.float32)
    weights = named_weights(model, fused_experts=how == "fused")
    if how == "fp8":
        scheme = {"quant_method": "fp8", "weight_block_size": [16, 16], "ignored_layers": ["lm_head"]}
        weights = quantised(weights, scheme)
    return weights


def with_adapters(model: nn.Module) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(model, settings)
    of = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=of)
    return model


@functools.cache
def ranks(timeout_s: float = 60.0) -> SyncRanks:
    return SyncRanks(timeout_s=timeout_s)


@functools.cache
def sync(senders: str = "all", timeout_s: float = 60.0, chunk_bytes: int = CHUNK_BYTES) -> WeightSync | None:
    """On the first rank."""
    if dist.get_rank():
        return None
    engines = [ReceivingEngine(name, 2) for name in "ab"]
    settings = {"chunk_bytes": chunk_bytes, "timeout_s": timeout_s, "senders": senders}
    return WeightSync(engines, transport=GlooTransport(), **settings)


def push(weights: Named, of: SyncRanks | None = None, **settings: Any) -> Any:
    made = sync(**settings)
    version = None if made is None else (made.version or 0) + 1
    return push_from_all_ranks(made, weights, version, None, ranks=of or ranks())


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank sends."""
    sent: list[int] = []
    publish = GlooTransport.publish

    def counting(transport, index, chunk):
        sent.append(sum(tensor.nbytes for _, tensor in chunk))
        return publish(transport, index, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooTransport, "publish", counting)
        yield sent


def held_by_workers(made: WeightSync) -> list[dict[str, torch.Tensor]]:
    return [worker.held for engine in made.engines for worker in engine.workers]


def synced(kind: str) -> dict[str, Any]:
    """One sync from all ranks, one from the first with the others gathering to it, one as all gather everything."""
    weights, found = sharded(kind), {}
    expected = whole(weights)
    for senders in ("all", "first"):
        with counted() as sent:
            receipt = push(weights, senders=senders)
        found[senders] = {"sent": sum(sent), "digest": receipt and receipt.digest, "bytes": receipt and receipt.bytes}
        if (made := sync(senders=senders)) is not None:
            for held in held_by_workers(made):
                assert held.keys() == expected.keys()
                wrong = [n for n in held if not torch.equal(held[n].view(torch.uint8), expected[n].view(torch.uint8))]
                assert not wrong, wrong
            assert receipt.workers == 4
            assert receipt.tensors == len(expected)
    if (made := sync(senders="first")) is None:
        gather_all(weights)
    else:
        found["gathered"] = made.push(weights, version=made.version + 1).digest
    found["largest"] = largest_unit(weights)
    return found


def exchanges(kind: str) -> tuple[int, int]:
    """How many exchanges gather weights in a sync from all ranks, and how many weights are not of one expert."""
    weights, exchange, made = sharded(kind), dist.all_to_all_single, []

    def counting(*args, **options):
        made.append(args)
        return exchange(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        push(weights)
    return len(made), len([name for name, _ in weights if ".experts." not in name])


def largest_unit(weights: Named) -> int:
    sizes: dict[Any, int] = {}
    for name, weight in weights:
        unit = id(weight.together[-1]) if weight.together else name
        sizes[unit] = sizes.get(unit, 0) + weight.shape.numel() * weight.dtype.itemsize
    return max(sizes.values())


def placements() -> None:
    """A tensor in every placement, to every owner: the owner has it whole, the others have no memory of it."""
    rank = dist.get_rank()
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cases = [
        (flat, [Shard(0)], (8, 3)),
        (flat, [Shard(0)], (5, 3)),
        (flat, [Shard(0)], (2, 3)),
        (flat, [Shard(1)], (3, 7)),
    ]
    cases += [(flat, [Shard(0)], (1,)), (flat, [Replicate()], (4, 4)), (square, [Replicate(), Shard(0)], (5, 2))]
    cases += [(square, [Shard(0), Replicate()], (3, 4)), (square, [Shard(0), Shard(1)], (5, 3))]
    cases += [(square, [Shard(0), Shard(0)], (7, 2)), (square, [Replicate(), Replicate()], (2, 2))]
    gathering = Gathering(20.0)
    for mesh, placed, shape in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)
            tensor = distribute_tensor(full, mesh, placed)
            for owner in range(4):
                with gathering.to(owner):
                    got = gathered(tensor)
                gathering.settle()
                assert (got.shape, got.dtype) == (full.shape, full.dtype)
                assert torch.equal(got, full) if rank == owner else got.is_meta, (placed, shape, owner, got)


def blocks() -> None:
    """A tensor in every placement by entries: each rank's block, sent to every owner, and to all."""
    rank = dist.get_rank()
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    strided = _StridedShard(0, split_factor=2)
    cases = [(flat, [Shard(0)], (8, 3)), (flat, [Shard(0)], (5, 3)), (flat, [Shard(0)], (2, 3))]
    cases += [(square, [Replicate(), Shard(0)], (5, 2)), (square, [Shard(0), Replicate()], (3, 4))]
    cases += [(square, [Shard(0), Shard(0)], (7, 2)), (square, [strided, Shard(0)], (8, 2))]
    gathering = Gathering(20.0)
    for mesh, placed, shape in cases:
        full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        tensor = distribute_tensor(full, mesh, placed)
        found = row_blocks(tensor)
        assert [block.first for block in found] == [0, *(block.last for block in found[:-1])]
        assert found[-1].last == len(full)
        mine = [full[block.first : block.last] for block in found if rank in block.holders]
        assert torch.equal(torch.cat(mine) if mine else full[:0], tensor.to_local()), (placed, shape)
        for block in found:
            expected = full[block.first : block.last]
            assert torch.equal(gathered_block(tensor, block), expected), (placed, shape, block)
            for owner in range(4):
                with gathering.to(owner):
                    got = gathered_block(tensor, block)
                gathering.settle()
                assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (placed, shape, block, owner)
                assert torch.equal(got, expected) if rank == owner else got.is_meta, (placed, shape, block, owner)
    for mesh, placed in ((flat, [Shard(1)]), (flat, [Replicate()]), (square, [Shard(0), Shard(1)])):
        assert row_blocks(distribute_tensor(torch.zeros(4, 4), mesh, placed)) == ()


# --- failures


def spoiled(weights: Named, number: int, action: Callable[[], None]) -> Named:
    """`weights`, of which one does something when it is made."""
    name, weight = weights[number]
    source = as_source(name, weight)

    def make():
        made = source.make()
        action()
        return made

    return [*weights[:number], (name, dataclasses.replace(source, make=make)), *weights[number + 1 :]]


def raises() -> None:
    raise MemoryError("no memory")


def sleeps() -> None:
    time.sleep(2.5 * LIMIT_S)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stops() -> None:
    """Stand still, with all threads, and go on by itself."""
    subprocess.Popen(["sh", "-c", f"sleep {2.5 * LIMIT_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def failing(where: int, what: str) -> dict[str, Any]:
    """A sync in which rank `where` fails; what this rank is told and when, and whether the next sync heals."""
    weights, of = sharded("softmax"), ranks(LIMIT_S)
    settings = {"timeout_s": LIMIT_S, "chunk_bytes": 1 << 17}
    made = sync(**settings)
    if made is not None and made.version is None:
        found = push(weights, of, **settings).version
    elif not of._syncs:
        push(weights, of, **settings)
    before = None if made is None else [worker.version for engine in made.engines for worker in engine.workers]
    given, mine = weights, dist.get_rank() == where
    action = {"raises": raises, "sleeps": sleeps, "dies": dies}.get(what)
    if mine and action is not None:
        given = spoiled(weights, 0 if what == "raises" else len(weights) // 2, action)
    if mine and what == "is late":
        sleeps()
    if mine and what == "has others":
        given = weights[:-1]
    patch = pytest.MonkeyPatch()
    if mine and what == "dies sending":
        patch.setattr(GlooTransport, "transfer", lambda *args: dies())
    if mine and what == "cannot send":
        patch.setattr(GlooTransport, "transfer", lambda *args: raises())
    if mine and what == "sends other bytes":
        publish = GlooTransport.publish
        patch.setattr(GlooTransport, "publish", lambda t, i, c: publish(t, i, [(n, w + 1) for n, w in c]))
    if mine and what == "is stopped at the end":
        committed, answer = Orders.committed, RankPart._committed
        patch.setattr(Orders, "committed", lambda *args: (stops(), committed(*args)))
        patch.setattr(RankPart, "_committed", lambda *args: (stops(), answer(*args)))
    if mine and what == "is stopped before it gathers":
        gather = Orders.gather
        patch.setattr(Orders, "gather", lambda *args: (patch.undo(), stops(), gather(*args)))
    dist.barrier() if what != "is late" else None
    start = time.monotonic()
    try:
        push(given, of, **settings)
        said = "committed"
    except SyncError as error:
        said = str(error)
    seconds = time.monotonic() - start
    patch.undo()
    found = {"said": said, "seconds": seconds}
    if made is not None:
        after = [worker.version for engine in made.engines for worker in engine.workers]
        found["untouched"] = before == after
    if "dies" not in what:
        expected = whole(weights)
        receipt = push(weights, of, **settings)
        if made is not None:
            found["healed"] = receipt.workers == 4 and all(
                all(torch.equal(held[name], expected[name]) for name in expected) for held in held_by_workers(made)
            )
    return found


def meeting_without(where: int) -> str:
    """What a rank is told that comes to the first sync, to which rank `where` does not."""
    of = SyncRanks(timeout_s=LIMIT_S)
    dist.barrier()
    if dist.get_rank() == where:
        dies()
    with pytest.raises(SyncError) as told:
        of.take_part([])
    return str(told.value)


def memory() -> dict[str, int]:
    """The most that this rank takes above its shards, with 16 MiB the largest tensor and 8 MiB under way in a round."""
    shape = {"layers": 2, "hidden": 512, "intermediate": 256, "experts": 16}
    weights = sharded_sync.weights(SimpleNamespace(device="cpu", **shape))
    measure = sharded_sync.Memory("cpu")
    of, made = SyncRanks(), None
    if not dist.get_rank():
        engine = ReceivingEngine("a", 1, keeps=False)
        made = WeightSync(engine, transport=GlooTransport(), chunk_bytes=8 << 20, dtype=torch.bfloat16)
    found = {}
    for version in (1, 2, 3, 4):
        dist.barrier()
        way = "parts" if version < 3 else "gathered"
        with measure.measured() as extra:
            if way == "parts":
                push_from_all_ranks(made, weights, version, None, ranks=of)
            elif made is not None:
                made.push(weights, version=version)
            else:
                gather_all(weights)
        found[way] = extra[0]
    return found
