"""A sync to which every trainer rank sends its part, beside one in which all gather and the first sends.

    torchrun --nproc-per-node 4 -m benchmarks.sharded_sync                             # CPU, gloo: 4 ranks, 3 engines
    torchrun --nproc-per-node 1 -m benchmarks.sharded_sync --device cuda               # 2 GPUs, NCCL: 1 rank, 1 worker
    torchrun --nproc-per-node 4 -m benchmarks.sharded_sync --device cuda --workers 4   # 8 GPUs: 4 ranks, 4 workers

One line of JSON. Weights are random, float32, in FSDP2's shards, and sent as bfloat16: so many decoder layers of fused
experts. Workers receive into memory, in processes of their own, check every digest, and load nothing: what is measured
is the trainer's side. On GPUs the ranks take the first ones and the workers the last, shared if too few: what shares
a GPU goes through sockets.

Three ways: `parts` (each rank sends its part), `first` (each weight is gathered to the first rank, which
sends all) and `gathered` (all ranks gather every weight, the first sends: `gather_all`).

Predicted, for n ranks, W bytes of weights, the largest tensor that is no expert of d bytes, and chunks of c:

- sent: of `parts` W / n on each rank; else W on the first and nothing on the others.
- extra memory, the most above the shards: of `parts` d on a rank, for the tensor that it gathers, and up to 4 c / n of
  chunks under way; of `gathered` one rank's experts of a layer on every rank, and 4 c on the first.
- seconds: of `parts` less than of `gathered` where gathering counts: each shard goes to one rank instead of to n.
- the sender's own time to 3 engines at most 1.3 of that to 1 where each worker has a link of its own. On one host
  without such links bytes to workers add up, and it grows with their number.
"""

import argparse
import contextlib
import ctypes
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.machine import machine, spread
from benchmarks.receiving_engine import ReceivingWorker
from r3.weight_sync import Engine, SyncRanks, SyncReceipt, WeightSync, gather_all
from r3.weight_sync.transports import TRANSPORTS, Transport
from r3.weight_sync.weights.lazy import LazyWeight, SharedMaterialization, as_source
from r3.weight_sync.weights.row_blocks import RowBlock, gathered_block, row_blocks

Named = list[tuple[str, LazyWeight]]
OWN = ("gather", "publish", "transfer", "digest")
"""Stages of the first rank's own work; the others wait for workers."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
WAYS = ("parts", "first", "gathered")


class ProcessEngine(Engine):
    """Workers in processes of their own."""

    remedy = ""

    def __init__(self, name: str, devices: Sequence[str]) -> None:
        self.name = name
        context = mp.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank, device in enumerate(devices):
            here, there = context.Pipe()
            args = (there, name, rank, len(devices), device)
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        for end in self._ends:
            end.send((method, args))
        return [end.recv() for end in self._ends]

    def pause(self, timeout_s: float) -> bool:
        return True

    def resume(self, timeout_s: float) -> None: ...

    def refuse(self, cause: str) -> None: ...

    def reset_caches(self, timeout_s: float) -> None: ...

    def set_weight_version(self, version: int, timeout_s: float) -> None: ...

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(end: Connection, name: str, rank: int, size: int, device: str) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)
    if device != "cpu":
        torch.cuda.set_device(device)
        if "NCCL_HOSTID" in os.environ:
            os.environ["NCCL_HOSTID"] = f"{name}/{rank}"
    worker = ReceivingWorker(f"{name}/{rank}", rank, size, torch.device(device), keeps=False)
    while True:
        method, args = end.recv()
        end.send(worker.answer(method, args))


def _parts(sharded: DTensor, block: RowBlock) -> list[torch.Tensor]:
    return list(gathered_block(sharded, block))


def weights(args: argparse.Namespace) -> Named:
    """In each layer two fused tensors of experts, cut apart as a checkpoint has them, and two small ones; sharded."""
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    named: Named = []

    def add(name: str, shape: tuple[int, ...], parts: int = 1) -> None:
        local = torch.randn((shape[0] // dist.get_world_size(), *shape[1:]), device=args.device)
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        if parts == 1:
            named.append((name, as_source(name, sharded)))
            return
        for block in row_blocks(sharded) or (RowBlock(0, parts, (0,)),):
            taken = SharedMaterialization(partial(_parts, sharded, block))
            for part in range(block.first, block.last):
                lazy: dict[str, Any] = {"name": f"{name}.{part}", "shape": sharded.shape[1:], "dtype": sharded.dtype}
                lazy |= {"make": partial(taken.take, part - block.first), "together": (taken,)}
                named.append((lazy["name"], LazyWeight(**lazy, holders=block.holders)))

    torch.manual_seed(dist.get_rank())
    for layer in range(args.layers):
        add(f"layers.{layer}.gate_up_proj", (args.experts, 2 * args.intermediate, args.hidden), args.experts)
        add(f"layers.{layer}.down_proj", (args.experts, args.hidden, args.intermediate), args.experts)
        add(f"layers.{layer}.q_proj", (args.hidden, args.hidden))
        add(f"layers.{layer}.norm", (args.hidden,))
    return named


class Memory:
    """The most memory that this rank takes above what it has at the start."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        if not self._on_gpu:
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)  # or freed memory stays, and hides what is taken next

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[int]]:
        found: list[int] = []
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield found
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated() - before)
            return
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = self._of("VmRSS")
        yield found
        found.append(self._of("VmHWM") - before)

    @staticmethod
    def _of(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


class SentBytes:
    """Counts what this rank hands to its transport."""

    def __init__(self, transport: type[Transport]) -> None:
        self.bytes = 0
        publish = transport.publish

        def counting(made: Any, index: int, chunk: Any) -> Any:
            self.bytes += sum(tensor.nbytes for _, tensor in chunk)
            return publish(made, index, chunk)

        transport.publish = counting  # pyrefly: ignore


def push(way: str, sync: dict[str, WeightSync], ranks: SyncRanks, named: Named) -> SyncReceipt | None:
    if way == "gathered":
        if not sync:
            gather_all(named)
            return None
        return sync["parts"].push(named, version=_version(sync["parts"]))
    if not sync:
        ranks.take_part(named)
        return None
    return sync[way].push(named, version=_version(sync[way]), ranks=ranks)


def _version(sync: WeightSync) -> int:
    return max(reply["version"] or 0 for engine in sync.engines for reply in engine.replies("r3_status", [], 60)) + 1


def measure(way: str, sync: dict[str, WeightSync], ranks: SyncRanks, named: Named, sent: SentBytes, args: Any) -> dict:
    """One sync of each rank: bytes it sent, extra memory, seconds; the receipt's stages on the first."""
    memory = Memory(args.device)
    dist.barrier()
    sent.bytes = 0
    with memory.measured() as extra:
        start = time.perf_counter()
        receipt = push(way, sync, ranks, named)
        seconds = time.perf_counter() - start
    mine = {"sent": sent.bytes, "extra": extra[0], "seconds": seconds}
    if receipt is not None:
        mine |= {"digest": receipt.digest, "bytes": receipt.bytes, "stages_s": receipt.stages_s}
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return {
        "sent_bytes": [each["sent"] for each in everyones],
        "extra_bytes": [each["extra"] for each in everyones],
        "seconds": [each["seconds"] for each in everyones],
        **{key: everyones[0][key] for key in ("digest", "bytes", "stages_s")},
    }


def of_engines(number: int, engines: list[Engine], ranks: SyncRanks, named: Named, sent: SentBytes, args: Any) -> dict:
    """All ways in turn, to the first `number` of the engines."""
    transport: dict[str, Any] = {"transport": TRANSPORTS[args.transport](), "chunk_bytes": args.chunk_mib << 20}
    settings: dict[str, Any] = transport | {"dtype": torch.bfloat16, "timeout_s": 300.0}
    senders: dict[str, Any] = {"parts": "all", "first": "first"}
    sync = {w: WeightSync(engines[:number], senders=s, **settings) for w, s in senders.items()} if engines else {}
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for way in WAYS:
        for turn in range(args.rounds + 1):  # the first connects
            one = measure(way, sync, ranks, named, sent, args)
            if turn:
                found[way].append(one)
    digests = {one["digest"] for ways in found.values() for one in ways}
    assert len(digests) == 1, f"the ways do not send the same: {digests}"
    if sync:
        settings["transport"].close()
    return {
        way: {
            "sent_bytes": turns[-1]["sent_bytes"],
            "extra_mib": [round(max(turn["extra_bytes"][r] for turn in turns) / 2**20, 1) for r in range(ranks.size)],
            "seconds": spread([max(turn["seconds"]) for turn in turns]),
            "own_s": spread([sum(turn["stages_s"].get(stage, 0.0) for stage in OWN) for turn in turns]),
            "stages_s": {name: round(seconds, 4) for name, seconds in turns[-1]["stages_s"].items()},
        }
        for way, turns in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--hidden", type=int, default=None)
    parser.add_argument("--intermediate", type=int, default=None)
    parser.add_argument("--experts", type=int, default=None)
    parser.add_argument("--engines", type=int, default=None, help="largest number; a run with one comes first")
    parser.add_argument("--workers", type=int, default=None, help="of each engine")
    parser.add_argument("--chunk-mib", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    small = {"layers": 4, "hidden": 512, "intermediate": 256, "experts": 16, "engines": 3, "workers": 2, "chunk_mib": 8}
    large = {"layers": 8, "hidden": 2048, "intermediate": 768, "experts": 128, "engines": 1, "workers": 1}
    for name, value in (small if args.device == "cpu" else large | {"chunk_mib": 512}).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.transport = "gloo" if args.device == "cpu" else "nccl"
    local = int(os.environ.get("LOCAL_RANK", 0))
    size, workers = int(os.environ["WORLD_SIZE"]), args.engines * args.workers
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    if gpus:
        if gpus < size + workers:  # NCCL takes what shares a GPU if it names hosts of its own
            os.environ["NCCL_SOCKET_IFNAME"] = "lo"
            os.environ["NCCL_HOSTID"] = "ranks" if size <= gpus else f"rank-{local}"
        torch.cuda.set_device(local % gpus)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    named, ranks, sent = weights(args), SyncRanks(timeout_s=300.0), SentBytes(TRANSPORTS[args.transport])
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        if not dist.get_rank():
            for number in range(args.engines):
                last = gpus - 1 - number * args.workers
                where = [f"cuda:{(last - at) % gpus}" if gpus else "cpu" for at in range(args.workers)]
                engines.append(stack.enter_context(contextlib.closing(ProcessEngine(f"engine {number}", where))))
        found: dict[str, Any] = {**machine(torch.device(args.device)), "transport": args.transport}
        found |= {"ranks": ranks.size, "workers": args.workers, "chunk_mib": args.chunk_mib}
        found["bytes"] = sum(2 * weight.shape.numel() for _, weight in named)
        found["largest_tensor_mib"] = 4 * 2 * args.experts * args.hidden * args.intermediate / 2**20
        for number in sorted({1, args.engines}):
            found[f"{number} engines"] = of_engines(number, engines, ranks, named, sent, args)
        if args.engines > 1:
            more, one = found[f"{args.engines} engines"], found["1 engines"]
            for what in ("seconds", "own_s"):
                found[f"{what} to {args.engines} engines / to 1"] = {
                    way: round(more[way][what]["median"] / one[way][what]["median"], 3) for way in WAYS
                }
        if not dist.get_rank():
            print(json.dumps(found))
    ranks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
