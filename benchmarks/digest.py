"""Digests of a model's tensors, and the search for NaN in the same pass, against a bare copy of the same bytes.

    python -m benchmarks.digest                     # 4 GB on the CPU, in one thread
    python -m benchmarks.digest --device cuda

One line of JSON. `ratio` is time over that of a copy within the same memory, in the same run and by turns; a copy reads
and writes, a digest reads. On the CPU there is one for each way to read the bytes. On a GPU `ratio` is of all that is
queued, as a sync does it, `written` where what is read is also written elsewhere, and `kernel` of the kernel alone;
`queue_us` is what the host spends on a chunk, and `from host` compares with the transfer of the same bytes from
page-locked memory.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch

from benchmarks.machine import machine, spread
from r3.weight_sync.integrity import digest_cpu
from r3.weight_sync.integrity.digest import ContentDigests

Chunk = list[tuple[str, torch.Tensor]]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of the job and of what it queued."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def chunks_of(device: torch.device, total_bytes: int, chunk_bytes: int, tensor_bytes: int) -> list[Chunk]:
    """Tensors of bfloat16, as experts are, each in memory of its own."""
    count = max(1, chunk_bytes // tensor_bytes)
    return [
        [(f"{at}.{i}", torch.randn(tensor_bytes // 2, device=device).to(torch.bfloat16)) for i in range(count)]
        for at in range(max(1, total_bytes // (count * tensor_bytes)))
    ]


def digests(chunks: list[Chunk], into: dict[str, torch.Tensor] | None = None) -> ContentDigests:
    found = ContentDigests()
    for chunk in chunks:
        found.add(chunk, into)
    return found


def compiled(chunks: list[Chunk], many_bytes: int) -> None:
    """All tensors in numpy, or all compiled."""
    before = digest_cpu.MANY_BYTES
    digest_cpu.MANY_BYTES = many_bytes
    try:
        digests(chunks)
    finally:
        digest_cpu.MANY_BYTES = before


def compared(jobs: dict[str, Callable[[], object]], device: torch.device, size: int, rounds: int) -> dict[str, object]:
    """Ratios over the job named `copy`, and rates in GB/s of the bytes of the tensors."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(-1, rounds):
        for name in list(jobs)[:: 1 if turn % 2 else -1]:
            taken = seconds(jobs[name], device)
            if turn >= 0:
                times[name].append(taken)
    found: dict[str, object] = {
        name: {"ratio": spread([mine / copy for mine, copy in zip(times[name], times["copy"], strict=True)])}
        for name in jobs
        if name != "copy"
    }
    found["GB_per_s"] = {name: spread([size / taken / 1e9 for taken in times[name]]) for name in jobs}
    return found


def on_cpu(chunks: list[Chunk], size: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(1)
    targets = [[tensor.clone() for _, tensor in chunk] for chunk in chunks]
    jobs: dict[str, Callable[[], object]] = {"copy": lambda: copied(chunks, targets)}
    jobs["numpy"] = lambda: compiled(chunks, 1 << 62)
    start = time.perf_counter()
    if digest_cpu._compiled() is not None:
        digest_cpu.read(chunks[0][0][1].view(torch.uint8).numpy(), 0, 0, many=True)
        jobs["numba"] = lambda: compiled(chunks, 0)
    start_s = time.perf_counter() - start
    return {"compilation_s": round(start_s, 2)} | compared(jobs, torch.device("cpu"), size, rounds)


def copied(chunks: list[Chunk], targets: list[list[torch.Tensor]]) -> None:
    for chunk, target in zip(chunks, targets, strict=True):
        for (_, source), to in zip(chunk, target, strict=True):
            to.copy_(source, non_blocking=True)


def on_cuda(chunks: list[Chunk], device: torch.device, size: int, rounds: int) -> dict[str, object]:
    from r3.weight_sync.integrity import digest_cuda
    from r3.weight_sync.integrity.digest import _lanes

    mask, ulp, _ = _lanes(torch.bfloat16)
    targets = [[torch.empty_like(tensor) for _, tensor in chunk] for chunk in chunks]
    names = [name for chunk in chunks for name, _ in chunk]
    into = dict(zip(names, itertools.chain.from_iterable(targets), strict=True))
    locked = [[(name, tensor.cpu().pin_memory()) for name, tensor in chunk] for chunk in chunks[:4]]
    reads = [[(tensor, mask, ulp, None, None) for _, tensor in chunk] for chunk in chunks]
    tables = [(torch.tensor(rows, device=device), count) for rows, count, _ in map(digest_cuda.describe, reads)]
    sums = [torch.zeros(len(chunk), 2, dtype=torch.int64, device=device) for chunk in chunks]

    def kernels() -> None:
        for (table, count), total in zip(tables, sums, strict=True):
            digest_cuda.launch(table, count, total, writes=False)

    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: copied(chunks, targets),
        "kernel": kernels,
        "queued": lambda: digests(chunks),
        "queued, and the result": lambda: digests(chunks).result(),
        "queued, and written": lambda: digests(chunks, into),
    }
    found = compared(jobs, device, size, rounds)
    part = sum(tensor.nbytes for chunk in locked for _, tensor in chunk)
    few = {"copy": lambda: copied(locked, targets[:4]), "queued": lambda: digests(chunks[:4])}
    found["from host"] = compared(few, device, part, rounds)
    queue_us = []
    whole = ContentDigests()
    for chunk in chunks:
        wait(device)
        start = time.perf_counter()
        whole.add(chunk)
        queue_us.append((time.perf_counter() - start) * 1e6)
    found["queue_us"] = spread(queue_us)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--chunk-mib", type=int, default=256)
    parser.add_argument("--tensor-mib", type=float, default=3.0, help="an expert's matrix of Qwen3-30B-A3B has 3 MiB")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    tensor_bytes = int(args.tensor_mib * (1 << 20)) // 2 * 2
    chunks = chunks_of(device, int(args.gigabytes * 1e9), args.chunk_mib << 20, tensor_bytes)
    size = sum(tensor.nbytes for chunk in chunks for _, tensor in chunk)
    found: dict[str, object] = dict(machine(device)) | {
        "bytes": size,
        "chunks": len(chunks),
        "tensors": sum(map(len, chunks)),
    }
    work = on_cuda(chunks, device, size, args.rounds) if device.type == "cuda" else on_cpu(chunks, size, args.rounds)
    print(json.dumps(found | work))


if __name__ == "__main__":
    main()
