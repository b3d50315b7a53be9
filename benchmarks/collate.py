"""Collation, packing and slicing of routing against a plain copy of the same bytes, and what a GPU waits for it.

    python -m benchmarks.collate                    # 4 GB on the CPU
    python -m benchmarks.collate --device cuda      # transfer beside computation

One line of JSON. Each `ratio` is time over that of a plain copy of the same bytes into memory that is as fresh: below 2
is at least half the bandwidth of the plain copy; the two take turns in going first. `warm` is a plain copy into memory
that has been written to before. On a GPU, a ratio is the time of a loop over that of the loop with all batches there.
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


def warm_rates(source: torch.Tensor, rounds: int) -> list[float]:
    target = torch.empty_like(source).copy_(source)
    return [source.nbytes / seconds(lambda: target.copy_(source)) / 2**30 for _ in range(rounds)]


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
    found: dict[str, object] = {"bytes": batch.expert_ids.nbytes, "row_bytes": packing.tokens * LAYERS * SLOTS}
    for name, (job, like) in jobs.items():
        # As fresh as what the job writes to: page faults are most of either's time.
        ways = {"plain": lambda like=like: torch.empty_like(like).copy_(like), "job": job}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(-1, rounds):
            # Who goes first may pay for memory that the host of a virtual machine has taken back.
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                taken = seconds(ways[way])
                if turn >= 0:
                    times[way].append(taken)
        ratios = [job / plain for job, plain in zip(times["job"], times["plain"], strict=True)]
        rates = {way: spread([like.nbytes / taken / 2**30 for taken in found]) for way, found in times.items()}
        found[name] = {"ratio": spread(ratios), "GiB_per_s": rates}
    found["warm"] = {"GiB_per_s": spread(warm_rates(packed.expert_ids, rounds))}
    found["shard_us"] = round(1e6 * min(seconds(lambda: packed.shard(1, 4)) for _ in range(20)), 1)
    before = reset_peak()
    kept = RolloutRouting.cat(parts)
    found["collate extra memory over routing"] = round((peak_bytes() - before) / kept.expert_ids.nbytes, 4)
    return found


def transfer(device: torch.device, batch_bytes: int, rounds: int) -> dict[str, object]:
    """A loop of matrix products over batches that are there already, prefetched, or moved when they are needed."""
    rows = batch_bytes // (LAYERS * SLOTS)
    one = first(samples(batch_bytes, 1)[0], rows // 2)
    pageable = [one.pad(rows) for _ in range(16)]
    locked = [batch.pin_memory() for batch in pageable]
    there = [batch.to(device) for batch in locked]
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
        "prefetched, page-locked": lambda: prefetch(locked, device),
        "prefetched, pageable": lambda: prefetch(pageable, device),
        "moved when needed, page-locked": lambda: (batch.to(device, non_blocking=True) for batch in locked),
        "moved when needed, pageable": lambda: (batch.to(device) for batch in pageable),
        "there, again": lambda: there,
    }
    found: dict[str, object] = {"batch_bytes": locked[0].expert_ids.nbytes}
    for name, way in ways.items():
        loop(way())
        found[name] = spread([loop(way()) / loop(there) for _ in range(rounds)])
    found["ms a batch"] = spread([loop(there) / len(there) * 1e3 for _ in range(rounds)])
    for name, source in (("page-locked", locked), ("pageable", pageable)):
        rates = []
        for batch in source:
            torch.cuda.synchronize()
            taken = seconds(lambda batch=batch: (batch.to(device, non_blocking=True), torch.cuda.synchronize()))
            rates.append(batch.expert_ids.nbytes / taken / 2**30)
        found[f"to the GPU alone, {name}"] = {"GiB_per_s": spread(rates)}
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
