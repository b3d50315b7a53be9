"""Collation, packing and slicing of routing against a plain copy of the same bytes, and what a GPU waits for it.

    python -m benchmarks.collate                    # 4 GB on the CPU
    python -m benchmarks.collate --device cuda      # transfer beside computation

One line of JSON. Each `ratio` is time over that of a copy of the same bytes into memory that is as fresh: below 2 is at
least half the bandwidth of the plain copy.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import machine, spread
from r3.routing import Packing, RolloutRouting, prefetch

LAYERS, SLOTS, EXPERTS = 48, 8, 128


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = function()
    taken = time.perf_counter() - start
    del kept  # after the clock: giving memory back takes time too
    return taken


def samples(total_bytes: int, count: int) -> list[RolloutRouting]:
    """Ragged samples, of half to one and a half times the mean length."""
    mean = total_bytes // (count * LAYERS * SLOTS)
    lengths = torch.randint(mean // 2, mean * 3 // 2, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.arange(SLOTS, dtype=torch.uint8).expand(1, max(lengths), LAYERS, SLOTS).contiguous()
    whole = RolloutRouting(ids, torch.ones(1, max(lengths), dtype=torch.bool), tuple(range(LAYERS)), EXPERTS)
    # Memory of its own for each, as captured routing has.
    return [first(whole, n).pad(n + 1) for n in lengths]


def first(routing: RolloutRouting, length: int) -> RolloutRouting:
    """Its first positions, in the same memory."""
    return routing.pack(Packing.from_mask(torch.arange(routing.shape[1])[None] < length))


def peak_bytes() -> int:
    """High-water mark of this process's resident memory since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def layouts(total_bytes: int, count: int, rounds: int) -> dict[str, object]:
    parts = samples(total_bytes, count)
    batch = RolloutRouting.cat(parts)
    packing = Packing.from_mask(batch.valid)
    packed = batch.pack(packing)
    jobs: dict[str, tuple[Callable[[], object], torch.Tensor]] = {
        "collate": (lambda: RolloutRouting.cat(parts), batch.expert_ids),
        "pack": (lambda: batch.pack(packing), packed.expert_ids),
        "unpack": (lambda: packed.unpack(packing), batch.expert_ids),
        "shard 1 of 4, copied": (lambda: packed.shard(1, 4).expert_ids.clone(), packed.shard(1, 4).expert_ids),
    }
    found: dict[str, object] = {"bytes": batch.expert_ids.nbytes, "samples": count}
    for name, (job, like) in jobs.items():
        ratios, rates = [], []
        for _ in range(rounds):
            # As fresh as what the job writes to: page faults are most of either's time.
            plain = seconds(lambda like=like: torch.empty_like(like).copy_(like))
            taken = seconds(job)
            ratios.append(taken / plain)
            rates.append(like.nbytes / taken / 2**30)
        found[name] = {"ratio": spread(ratios), "GiB_per_s": spread(rates)}
    found["shard_us"] = round(1e6 * min(seconds(lambda: packed.shard(1, 4)) for _ in range(20)), 1)
    before = reset_peak()
    kept = RolloutRouting.cat(parts)
    found["collate extra memory over routing"] = round((peak_bytes() - before) / kept.expert_ids.nbytes, 4)
    return found


def transfer(device: torch.device, batch_bytes: int, rounds: int) -> dict[str, object]:
    """A loop of matrix products over batches that are there already, prefetched, or moved when they are needed."""
    rows = batch_bytes // (LAYERS * SLOTS)
    one = first(samples(batch_bytes, 1)[0], rows // 2)
    batches = [one.pad(rows).pin_memory() for _ in range(8)]
    pageable = [one.pad(rows) for _ in range(8)]
    there = [batch.to(device) for batch in batches]
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def loop(source: object) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for batch in source:  # type: ignore[attr-defined]
            for _ in range(12):
                a @ a
            batch.expert_ids.sum()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    ways: dict[str, Callable[[], object]] = {
        "prefetched": lambda: prefetch(batches, device),
        "moved when needed, pageable": lambda: (batch.to(device) for batch in pageable),
    }
    loop(there)
    found: dict[str, object] = {"batch_bytes": batches[0].expert_ids.nbytes}
    for name, way in ways.items():
        loop(way())
        found[name] = spread([loop(way()) / loop(there) for _ in range(rounds)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="routing to collate")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, object] = dict(machine(device))
    if device.type == "cuda":
        found |= transfer(device, 256 << 20, args.rounds)
    found |= layouts(int(args.gigabytes * 1e9), args.samples, args.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
