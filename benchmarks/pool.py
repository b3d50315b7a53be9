"""What an engine pool costs by itself: its scheduling of requests, and a weight sync to three engines instead of one.

    python -m benchmarks.pool                                 # 64 engines, 2,000 requests a second for 10 s
    python -m benchmarks.pool --rate 2000 --latency-s 4       # more of them in flight
    python -m benchmarks.pool --sync --mib 2048               # the sender's own time

One line of JSON. The engines are simulated: they answer after a time, and workers of a sync answer at once.

Requests: CPU time of a process that sends them through the pool, less that of one that hands the same requests to the
same engines in turn. Prediction: a turn of the event loop takes 3 us with either; choosing the least of 64 loads is 1
us, counting in and out 2 us, one more future and its callback 4 us: 5 to 10 us a request, that is 1 to 2% of a core at
2,000 requests a second. Of one request alone, from `submit` to the engine: below 0.05 ms.

Sync: gather, publish and digest happen once, whatever the number of engines; calls go out in parallel, each by a thread
that waits. Prediction: of the sender's own stages (gather, publish, transfer, digest) three engines take 1.0 to 1.1 of
what one takes.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.machine import machine, spread
from r3.pool.clients import EngineClient
from r3.pool.dispatch import Dispatcher
from r3.pool.member import Member
from r3.pool.request import Request
from r3.weight_sync import Engine, WeightSync, combine

OWN = ("gather", "publish", "transfer", "digest")
TICK_S = 0.01


class TimedEngine(EngineClient):
    """Answers each request after `latency_s`, all that are due at once by one timer of the loop."""

    def __init__(self, name: str, latency_s: float) -> None:
        self.name = name
        self._latency_s = latency_s
        self._due: list[asyncio.Future] = []

    def start(self, request: Request) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        if not self._due:
            loop.call_later(self._latency_s, self._answer, self._due)
        self._due.append(answer)
        if len(self._due) == 16:
            self._due = []
        return answer

    async def cause_of_death(self, timeout_s: float) -> str | None:
        return None

    def _answer(self, due: list[asyncio.Future]) -> None:
        if due is self._due:
            self._due = []
        for answer in due:
            answer.set_result(b"")


async def schedule(options: argparse.Namespace, *, pool: bool) -> tuple[float, list[float]]:
    """CPU seconds for all requests, and seconds from `submit` to the engine for each batch of a tick."""
    engines = [TimedEngine(f"engine-{number}", options.latency_s) for number in range(options.engines)]
    dispatcher = Dispatcher(max_in_flight=options.max_in_flight)
    for engine in engines:
        dispatcher.add(Member(engine))
    loop = asyncio.get_running_loop()
    a_tick = int(options.rate * TICK_S)
    answers: list[asyncio.Future] = []
    submitted, sent = [], 0
    start, cpu = time.monotonic(), time.process_time()
    for tick in range(int(options.seconds / TICK_S)):
        requests = [
            Request(
                [1] * 16,
                {"n": 1, "max_tokens": 100},
                loop.create_future(),
                conversation=(tick, number) if options.turns else None,
            )
            for number in range(a_tick)
        ]
        before = time.perf_counter()
        for request in requests:
            if pool:
                dispatcher.submit(request)
            else:
                engine = engines[sent % len(engines)]
                under_way = engine.start(request)
                under_way.add_done_callback(lambda done, answer=request.answer: answer.set_result(done.result()))
            sent += 1
        submitted.append((time.perf_counter() - before) / a_tick)
        answers += [request.answer for request in requests]
        await asyncio.sleep(max(0.0, start + (tick + 1) * TICK_S - time.monotonic()))
    await asyncio.gather(*answers)
    return time.process_time() - cpu, submitted


def requests(options: argparse.Namespace) -> dict[str, Any]:
    pooled, alone, submitted = [], [], []
    for _ in range(options.repeats):
        cpu, times = asyncio.run(schedule(options, pool=True))
        pooled.append(cpu)
        submitted += times
        alone.append(asyncio.run(schedule(options, pool=False))[0])
    count = int(options.rate * TICK_S) * int(options.seconds / TICK_S)
    own = [1e6 * (one - other) / count for one, other in zip(pooled, alone, strict=True)]
    return {
        "engines": options.engines,
        "requests": count,
        "own_us_a_request": spread(own),
        "core_share_at_2000_a_second": spread([each * 1e-6 * 2000 for each in own]),
        "submit_ms": spread([1e3 * each for each in submitted]),
        "cpu_s": {"pool": spread(pooled), "engines alone": spread(alone)},
    }


class InstantWorkers(Engine):
    """Workers that read nothing and say what a sync wants to hear."""

    remedy = ""

    def __init__(self, name: str) -> None:
        self.name = name
        self._version: int | None = None

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        reply = {"rank": 0, "dp_rank": 0, "world_size": 1, "dp_size": 1, "worker": self.name, "gpu": None}
        reply |= {"version": self._version, "state": "idle", "cause": "", "connection_id": None, "base_version": None}
        match method:
            case "r3_reserve":
                self._next = args[1]
            case "r3_begin":
                reply |= {"draft": "", "kept": {}}
            case "r3_seal":
                self._digest = combine(args[1])
                reply["digest"] = self._digest
            case "r3_commit":
                self._version = self._next
                reply |= {"version": self._version, "digest": self._digest}
        return [reply]

    def pause(self, timeout_s: float) -> bool:
        return True

    def resume(self, timeout_s: float) -> None: ...

    def refuse(self, cause: str) -> None: ...

    def reset_caches(self, timeout_s: float) -> None: ...

    def set_weight_version(self, version: int, timeout_s: float) -> None: ...


def sync(options: argparse.Namespace) -> dict[str, Any]:
    size = 4 << 20
    weights = [(f"layer.{n}", torch.randn(size // 2).bfloat16()) for n in range(options.mib * 2**20 // size)]
    syncs = {count: WeightSync([InstantWorkers(f"engine-{n}") for n in range(count)]) for count in (1, 3)}
    own: dict[int, list[float]] = {count: [] for count in syncs}
    for version in range(1, options.repeats + 2):
        for count, each in syncs.items():
            receipt = each.push(weights, version=version)
            if version > 1:  # the first makes what the others find
                own[count].append(sum(receipt.stages_s.get(stage, 0.0) for stage in OWN))
    for each in syncs.values():
        each.close()
    ratios = [three / one for one, three in zip(own[1], own[3], strict=True)]
    return {
        "mib": options.mib,
        "own_s": {count: spread(times) for count, times in own.items()},
        "ratio": spread(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2000.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--latency-s", type=float, default=1.0)
    parser.add_argument("--max-in-flight", type=int, default=256)
    parser.add_argument("--turns", action="store_true", help="each request is a turn of a conversation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sync", action="store_true", help="a weight sync instead of requests")
    parser.add_argument("--mib", type=int, default=512, help="of weights")
    options = parser.parse_args()
    found = sync(options) if options.sync else requests(options)
    print(json.dumps(machine(torch.device("cpu")) | found))


if __name__ == "__main__":
    main()
