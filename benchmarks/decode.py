"""Decoding, checking and collating routing that came over HTTP, against a bare base64 decode and one copy.

    python -m benchmarks.decode                     # 1 GB, as vLLM's server sends it: base64 of .npy files
    python -m benchmarks.decode --spread 0          # samples of one length: no padding
    python -m benchmarks.decode --wire              # the wire form too

One line of JSON. `bare` decodes all strings, then copies the bytes into one fresh buffer; `ours` is `decode_npy` and
`checked_rows` for each, then `RolloutRouting.cat`, with the same decoder, with and without the compiled check. They
take turns to go first; `ratio` is ours over bare within a turn. `padding` is what the batch holds beyond the rows:
ours writes it, bare does not. `shares` are the seconds of each part.
"""

import argparse
import base64
import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from unittest import mock

import numpy as np
import torch

from benchmarks.machine import machine, spread
from r3.capture import rows as capture_rows
from r3.routing import RolloutRouting, RoutingSpec, checks

LAYERS, SLOTS = 48, 8
Decoder = Callable[..., bytes]


def decoders() -> dict[str, Decoder]:
    found: dict[str, Decoder] = {"standard library": base64.b64decode}
    try:
        import pybase64
    except ImportError:
        return found
    return found | {"pybase64": pybase64.b64decode}


def responses(total_bytes: int, count: int, ragged: float, experts: int) -> list[str]:
    """Base64 of `.npy` files, of lengths around their mean: from 1 - `ragged` to 1 + `ragged` of it."""
    mean = total_bytes // (count * LAYERS * SLOTS * np.dtype(np.uint8 if experts <= 256 else np.uint16).itemsize)
    rng = np.random.default_rng(0)
    lengths = rng.integers(int(mean * (1 - ragged)), int(mean * (1 + ragged)) + 1, count)
    some = torch.rand(1 << 15, experts, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :SLOTS].numpy()
    some = some.astype(np.uint8 if experts <= 256 else np.uint16)
    texts = []
    for length in lengths:
        file = io.BytesIO()
        rows = np.resize(np.roll(some, int(rng.integers(len(some))), 0), (length * LAYERS, SLOTS))
        np.save(file, rows.reshape(length, LAYERS, SLOTS))
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def bare(texts: list[str], decode: Decoder) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    parts = [decode(text, validate=True) for text in texts]
    decoded = time.perf_counter()
    target = torch.empty(sum(map(len, parts)), dtype=torch.uint8)  # of the allocator that ours uses
    at = 0
    for part in parts:
        np.copyto(target[at : at + len(part)].numpy(), np.frombuffer(part, np.uint8))
        at += len(part)
    end = time.perf_counter()
    return end - start, {"decode": decoded - start, "copy": end - decoded}


def ours(texts: list[str], spec: RoutingSpec) -> tuple[float, dict[str, float]]:
    shares = {"decode_npy": 0.0, "checked_rows": 0.0, "cat": 0.0}
    start = time.perf_counter()
    parts = []
    for text in texts:
        begun = time.perf_counter()
        array = capture_rows.decode_npy(text, max_bytes=1 << 30)
        decoded = time.perf_counter()
        parts.append(capture_rows.checked_rows(array, spec, tokens=len(array) + 1))
        del array
        shares["decode_npy"] += decoded - begun
        shares["checked_rows"] += time.perf_counter() - decoded
    collating = time.perf_counter()
    batch = RolloutRouting.cat(parts)
    end = time.perf_counter()
    shares["cat"] = end - collating
    del batch
    return end - start, shares


@contextlib.contextmanager
def using(decode: Decoder) -> Iterator[None]:
    with mock.patch.object(capture_rows, "_base64_decoder", return_value=decode):
        yield


def wire(texts: list[str], spec: RoutingSpec, rounds: int) -> dict[str, object]:
    """Rates of the wire form of the batch, over the ids' bytes."""
    arrays = [capture_rows.decode_npy(text, max_bytes=1 << 30) for text in texts]
    batch = RolloutRouting.cat([capture_rows.checked_rows(a, spec, tokens=len(a) + 1) for a in arrays])
    size = batch.expert_ids.nbytes
    found: dict[str, object] = {"ids_bytes": size}
    for compress in (False, True):
        out, back = [], []
        for _ in range(rounds if not compress else 1):
            start = time.perf_counter()
            message = batch.to_bytes(compress=compress)
            written = time.perf_counter()
            RolloutRouting.from_bytes(message, max_bytes=1 << 40)
            out.append(size / (written - start) / 1e9)
            back.append(size / (time.perf_counter() - written) / 1e9)
        name = "compressed" if compress else "plain"
        found[name] = {
            "size": round(len(message) / size, 6),
            "to_bytes GB/s": spread(out),
            "from_bytes GB/s": spread(back),
        }
    return found


def without_compiled_check() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(checks, "_compiled_repeated_bytes", return_value=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="routing, before base64")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.5, help="lengths are within this share of their mean")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as torch chooses")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wire", action="store_true", help="the wire form too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = responses(int(args.gigabytes * 1e9), args.samples, args.spread, args.experts)
    spec = RoutingSpec(layer_ids=tuple(range(LAYERS)), num_layers=LAYERS, num_experts=args.experts, top_k=SLOTS)
    jobs: dict[str, Callable[[], tuple[float, dict[str, float]]]] = {}
    for name, decode in decoders().items():

        def run_ours(decode: Decoder = decode) -> tuple[float, dict[str, float]]:
            with using(decode):
                return ours(texts, spec)

        def run_plain(decode: Decoder = decode) -> tuple[float, dict[str, float]]:
            with using(decode), without_compiled_check():
                return ours(texts, spec)

        jobs[f"bare, {name}"] = lambda decode=decode: bare(texts, decode)
        jobs[f"ours, {name}"] = run_ours
        jobs[f"ours without numba, {name}"] = run_plain
    times: dict[str, list[float]] = {name: [] for name in jobs}
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for turn in range(-1, args.rounds):
        for name in list(jobs)[:: 1 if turn % 2 else -1]:
            taken, parts = jobs[name]()
            if turn >= 0:
                times[name].append(taken)
                shares[name].append(parts)
    found: dict[str, object] = dict(machine(torch.device("cpu")))
    for package in ("numpy", "pybase64", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    lengths = [len(capture_rows.decode_npy(text, max_bytes=1 << 30)) for text in texts]
    found["bytes"] = sum(lengths) * LAYERS * SLOTS * (1 if args.experts <= 256 else 2)
    found["padding"] = round(len(lengths) * (max(lengths) + 1) / sum(lengths) - 1, 3)
    for name, taken in times.items():
        kind, decoder = name.split(", ")
        entry: dict[str, object] = {"s": spread(taken)}
        if kind != "bare":
            entry["ratio"] = spread([a / b for a, b in zip(taken, times[f"bare, {decoder}"], strict=True)])
        entry["shares"] = {
            part: round(float(np.median([s[part] for s in shares[name]])), 4) for part in shares[name][0]
        }
        found[name] = entry
    if "pybase64" in decoders():
        pairs = zip(times["ours, pybase64"], times["bare, standard library"], strict=True)
        found["ours with pybase64 over bare standard library"] = spread([a / b for a, b in pairs])
    if args.wire:
        found["wire"] = wire(texts, spec, args.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
