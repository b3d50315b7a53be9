"""Schedules of faults for weight syncs, each made from a seed, and what faults do to bytes.

python tests/faults/schedules.py --schedules 300 --seed 0      # seeds 0 to 299, against one real server
python tests/faults/schedules.py --only 17                     # one of them again
python tests/faults/schedules.py --gpu --schedules 30          # NCCL and CUDA IPC; senders on a second GPU, if any
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
Chunk = list[tuple[str, torch.Tensor]]

CPU, GPU = ("files", "gloo"), ("nccl", "ipc")
"""Transports that schedules choose between."""

LOADS = ("load:0", "load:1", "load:3", "load:5")
WORKER_POINTS = ("reserve", "begin", *LOADS, "seal", "commit", "release")
POINTS = ("reserve", "pause", "begin", *LOADS, "caches", "seal", "commit", "resume", "release")
TENSOR = ("flip", "nan", "shape", "dtype", "lost", "doubled", "renamed", "swapped", "zeros")
FILE = ("flip", "header", "truncated", "removed", "zeros")
CONTENT = ("missing", "unknown", "twice", "nan", "inf", "larger", "smaller", "gather raises", "gather changes")
CALL = ("lost", "doubled", "reordered")

KINDS = {
    "sender killed": 6,
    "sender stopped": 8,
    "sender raises": 5,
    "worker stopped": 8,
    "worker raises": 2,
    "worker memory": 9,
    "transit": 12,
    "file": 6,
    "call": 6,
    "content": 14,
    "disk full": 4,
    "held": 8,
    "late": 5,
    "old version": 2,
    "two at once": 4,
    "none": 2,
}
"""Kind -> how often. Killed workers cost a start of the engine each, and are asked for by their own number."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Attributes:
    kind: of `KINDS`, or "worker killed".
    point: the call of the sync at which it happens, "load:3" for that of chunk 3; "start" for the list of weights.
    when: before or after the call.
    how: which damage, of the kinds that have several.
    rank: of the worker.
    pick: in [0, 1), which tensor, bit or earlier call.
    """

    kind: str
    point: str = "start"
    when: str = "before"
    how: str = ""
    rank: int | None = None
    pick: float = 0.0

    def __str__(self) -> str:
        who = "" if self.rank is None else f" (rank {self.rank})"
        return f"{self.kind}{who}{' ' + self.how if self.how else ''} {self.when} {self.point}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One sync with faults, and all that is needed to run it again.

    Attributes:
        weights: the set that is sent; what the engine holds before is another one.
        fused: whether experts are sent as one tensor.
        busy: whether completions are under way; `on_running` is what a pause does with them.
        long: whether what is stopped or held stays so for longer than the timeout and the lease.
    """

    seed: int
    transport: str
    delta: bool
    fused: bool
    weights: str
    busy: bool
    on_running: str
    long: bool
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        mode = f"{self.transport}{'+delta' if self.delta else ''}{' fused' if self.fused else ''}"
        extra = f"{f' busy ({self.on_running})' if self.busy else ''}{' long' if self.long else ''}"
        return f"seed {self.seed}: {mode} to {self.weights}{extra} | {'; '.join(map(str, self.faults)) or 'no fault'}"


def schedule(seed: int, transports: Sequence[str] = CPU) -> Schedule:
    """The schedule of `seed`, always the same."""
    of = random.Random(seed)
    transport, delta = of.choice(transports), of.random() < 0.4
    kinds = of.choices(list(KINDS), list(KINDS.values()), k=2 if of.random() < 0.25 else 1)
    faults = tuple(_fault(kind, of) for kind in dict.fromkeys(kinds) if kind != "none")
    if any(fault.kind in ("file", "disk full") for fault in faults):
        transport = "files"
    return Schedule(
        seed=seed,
        transport=transport,
        delta=delta,
        fused=of.random() < 0.5,
        weights=of.choice("ABC"),
        busy=of.random() < 0.35,
        on_running=of.choice(["wait", "abort", "keep"]),
        long=of.random() < 0.5,
        faults=faults,
    )


def killed(seed: int, transports: Sequence[str] = CPU) -> Schedule:
    """A schedule in which a worker dies: the engine must be started again."""
    of = random.Random(f"killed {seed}")
    fault = Fault(
        kind="worker killed",
        point=of.choice(WORKER_POINTS),
        when=of.choice(["before", "after"]),
        rank=of.choice([0, 1]),
    )
    return Schedule(
        seed=-1 - seed,
        transport=of.choice(transports),
        delta=of.random() < 0.5,
        fused=of.random() < 0.5,
        weights=of.choice("ABC"),
        busy=of.random() < 0.5,
        on_running=of.choice(["wait", "abort", "keep"]),
        long=False,
        faults=(fault,),
    )


def of_the_only_worker(fault: Fault) -> Fault:
    return fault if fault.rank is None else replace(fault, rank=0)


def _fault(kind: str, of: random.Random) -> Fault:
    where: dict[str, Any] = {"kind": kind, "pick": of.random()}
    load = f"load:{of.choice([0, 0, 1, 2, 4, 5])}"
    match kind:
        case "content":
            return Fault(how=of.choice(CONTENT), **where)
        case "old version" | "two at once":
            return Fault(**where)
        case "transit":
            return Fault(point=load, how=of.choice(TENSOR), **where)
        case "worker memory":
            return Fault(point=load, how=of.choice(TENSOR), rank=of.choice([0, 1]), **where)
        case "worker raises":
            return Fault(point=load, rank=of.choice([0, 1]), **where)
        case "file":
            return Fault(point=load, how=of.choice(FILE), **where)
        case "call":
            return Fault(point=load, how=of.choice(CALL), **where)
        case "disk full":
            return Fault(point=load, **where)
        case "worker stopped":
            when = of.choice(["before", "after"])
            return Fault(point=of.choice(WORKER_POINTS), when=when, rank=of.choice([0, 1]), **where)
        case _:
            return Fault(point=of.choice(POINTS), when=of.choice(["before", "after"]), **where)


def tampered(chunk: Chunk, how: str, pick: float) -> tuple[Chunk, str]:
    """Another chunk in place of `chunk`, and the name of the tensor that is wrong in it ("" if nothing could be)."""
    if not chunk:
        return chunk, ""
    chunk = list(chunk)
    at = int(pick * len(chunk))
    name, tensor = chunk[at]
    bad = tensor.clone()
    data = bad.view(-1).view(torch.uint8)
    match how:
        case "flip":
            data[int(pick * len(data))] ^= 1 << int(pick * 8)
        case "nan" if bad.is_floating_point():
            bad.view(-1)[int(pick * bad.numel())] = torch.nan
        case "zeros" if bool(data.any()):
            data.zero_()
        case "shape":
            bad = bad[:-1]
        case "dtype":
            bad = bad.to(torch.float64)
        case "lost":
            return chunk[:at] + chunk[at + 1 :], name
        case "doubled":
            return [*chunk, chunk[at]], name
        case "renamed":
            return [*chunk[:at], (f"{name}.renamed", tensor), *chunk[at + 1 :]], name
        case "swapped":
            like = [i for i, (_, t) in enumerate(chunk) if (t.shape, t.dtype) == (bad.shape, bad.dtype) and i != at]
            if not like or torch.equal(tensor, chunk[like[0]][1]):
                return chunk, ""
            chunk[at], chunk[like[0]] = (name, chunk[like[0]][1]), (chunk[like[0]][0], tensor)
            return chunk, name
        case _:
            return chunk, ""
    chunk[at] = (name, bad)
    return chunk, name


def main() -> int:
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]
    import conftest  # noqa: F401 (the environment of the tests, for what is started here)
    from fault_harness import Harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; each has the next seed")
    parser.add_argument("--killed", type=int, default=3, help="how many more in which a worker dies")
    parser.add_argument("--only", type=int, nargs="+", help="run these seeds alone; -1, -2, ...: a worker dies")
    parser.add_argument("--gpu", action="store_true", help="one worker, on a GPU")
    parser.add_argument("--list", action="store_true", help="print the schedules, run nothing")
    options = parser.parse_args()
    seeds = options.only or [
        *range(options.seed, options.seed + options.schedules),
        *range(-1, -1 - options.killed, -1),
    ]
    transports = GPU if options.gpu else CPU
    schedules = [schedule(seed, transports) if seed >= 0 else killed(-1 - seed, transports) for seed in seeds]
    if options.gpu:
        schedules = [replace(one, faults=tuple(map(of_the_only_worker, one.faults))) for one in schedules]
    if options.list:
        print(*schedules, sep="\n")
        return 0
    with Harness(gpu=options.gpu) as harness:
        for number, one in enumerate(schedules, 1):
            outcome = harness.run(one)
            print(f"[{number}/{len(schedules)}] {one}\n    -> {outcome}", flush=True)
        print(harness.table(), flush=True)
    if harness.leaked:
        print(f"left in shared memory: {harness.leaked}")
    return 1 if harness.violations or harness.leaked else 0


if __name__ == "__main__":
    sys.exit(main())
