"""Runs schedules of faults against a pool of three real servers, and judges how each ended."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_outcome import Outcome
from fault_sender import weights
from places import DEMO_MODEL
from pool_schedules import PoolFault, PoolSchedule
from pool_servers import PoolServer, pool_servers

from r3.capture import Rollouts
from r3.errors import SyncError
from r3.pool import EnginePool, PoolLimits
from r3.weight_sync import WeightSync

PROMPTS, TOKENS = 9, 24


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Attributes:
    timeout_s: of one call of a sync, and the lease.
    short_s, long_s: how long an engine stands still that is to go on in time, and one that is not.
    push_limit_s: a sync that takes longer hangs.
    limits: of the pool.
    """

    timeout_s: float
    short_s: float
    long_s: float
    push_limit_s: float
    limits: PoolLimits


REAL = Pace(
    timeout_s=5.0,
    short_s=1.0,
    long_s=9.0,
    push_limit_s=40.0,
    limits=PoolLimits(max_in_flight=1, max_attempts=4, health_every_s=0.5, health_timeout_s=1.0, request_timeout_s=7.0),
)
OFF = ["generator.inference_engine.enable_return_routed_experts=false"]
OFF += ["trainer.policy.fsdp_config.moe_enable_routing_replay=false"]
SAMPLING = {"temperature": 0.0, "max_tokens": TOKENS, "logprobs": 0, "ignore_eos": True}


class PoolHarness:
    """Three servers, from schedule to schedule; engines that died are started again.

    Attributes:
        exact: whether samples that share a batch have the tokens that each has alone.
    """

    exact = False

    def __init__(self, pace: Pace = REAL) -> None:
        self.pace = pace
        self._stack = contextlib.ExitStack()
        self.servers: list[Any] = []
        self.outcomes: list[tuple[PoolSchedule, Outcome]] = []
        self.violations = 0
        self._known: dict[str, list[list[int]]] = {}
        self._version = 0
        of = torch.Generator().manual_seed(0)
        self._prompts = [torch.randint(2, 300, (24,), generator=of).tolist() for _ in range(PROMPTS)]

    def __enter__(self) -> "PoolHarness":
        self.servers = self._stack.enter_context(pool_servers(3, *OFF))
        with self._pool(self.servers[:1]) as pool:
            for name in "ABC":
                pool.push(self._weights(name), version=self._next())
                # One at a time: what shares a batch changes the last bits.
                self._known[name] = [item.token_ids for item in pool.generate(self._prompts, SAMPLING, None)]
        if len({str(known) for known in self._known.values()}) < 3:
            raise RuntimeError("sets of weights that cannot be told apart")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self, schedule: PoolSchedule) -> Outcome:
        outcome, start = Outcome(), time.monotonic()
        try:
            self._run(schedule, outcome)
        except Exception as error:
            outcome.kind = outcome.kind or "harness failed"
            outcome.violations.append(f"{type(error).__name__}: {error}")
        self._recover()
        outcome.seconds = time.monotonic() - start
        self.outcomes.append((schedule, outcome))
        self.violations += bool(outcome.violations)
        return outcome

    def table(self) -> str:
        kinds = Counter(outcome.kind for _, outcome in self.outcomes)
        rows = [f"{len(self.outcomes)} schedules: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())]
        by_fault: dict[str, Counter] = {}
        for schedule, outcome in self.outcomes:
            by_fault.setdefault(schedule.fault.kind, Counter())[outcome.kind] += 1
        rows += [f"  {fault:18} " + ", ".join(f"{n} {k}" for k, n in by_fault[fault].items()) for fault in by_fault]
        rows.append(f"{self.violations} with violations")
        return "\n".join(rows + [f"  {schedule}: {v[:300]}" for schedule, o in self.outcomes for v in o.violations])

    # -- a schedule ---------------------------------------------------------------------------------------------------

    def _run(self, schedule: PoolSchedule, outcome: Outcome) -> None:
        fault = schedule.fault
        first = [s for n, s in enumerate(self.servers) if fault.kind != "joins" or n != fault.engine]
        with self._pool(first, transport=schedule.transport, on_lost=schedule.on_lost) as pool:
            self._first_push(pool, fault)
            held = {pool.version: "A"}
            strike = threading.Thread(target=self._strike, args=(pool, fault), daemon=True)
            if fault.phase == "rollouts":
                strike.start()
            self._rollouts(pool, schedule, held, outcome)
            if fault.phase == "sync":
                outcome.reached = self._strike_before(pool, fault, strike)
            pushed = self._push(pool, schedule, held, outcome)
            if fault.phase == "rollouts after":
                strike.start()
            if pushed:
                self._rollouts(pool, schedule, held, outcome)
            if strike.ident is not None:
                strike.join(60)
            self._heal(pool, schedule, held, outcome)

    def _first_push(self, pool: EnginePool, fault: PoolFault) -> None:
        pool.push(self._weights("A"), version=self._next())

    def _push(self, pool: EnginePool, schedule: PoolSchedule, held: dict[int, str], outcome: Outcome) -> bool:
        start, version = time.monotonic(), self._next()
        try:
            receipt = pool.push(self._weights(schedule.weights), version=version)
        except SyncError as error:
            outcome.kind = "refused or poisoned, healed"
            outcome.said.append(f"SyncError: {error}")
            names = [server.url for server in self.servers]
            if not any(name in str(error) for name in names):
                outcome.violations.append(f"the error names no engine: {error}")
            if schedule.on_lost == "remove" and schedule.fault.whole and schedule.fault.kind == "killed":
                outcome.violations.append("the sync did not go on without a killed engine")
            return pool.sync.poisoned is None
        finally:
            if time.monotonic() - start > self.pace.push_limit_s:
                outcome.violations.append(f"the sync took {time.monotonic() - start:.0f} s")
        held[version] = schedule.weights
        states = pool.engines
        outcome.kind = "committed" if len(states) == 3 else f"committed on {len(states)}"
        if receipt.workers != len(pool.sync.engines):
            outcome.violations.append(f"{receipt.workers} workers of {len(pool.sync.engines)} engines committed")
        return True

    def _rollouts(self, pool: EnginePool, schedule: PoolSchedule, held: dict[int, str], outcome: Outcome) -> None:
        """Each rollout comes once, with the tokens of the weights that it names."""
        # Greedy requests have one sample. What is drawn is not known before.
        drawn = {} if schedule.samples == 1 else {"n": schedule.samples, "temperature": 1.0}
        found: Rollouts = pool.generate(self._prompts, SAMPLING | drawn, None)
        places = [place for place in range(PROMPTS) for _ in range(schedule.samples)]
        if [item.prompt_index for item in found] != places:
            outcome.violations.append(f"expected rollouts of {places}, got {[i.prompt_index for i in found]}")
        exact = self.exact or schedule.samples == 1
        for item in found:
            (version,) = item.weight_versions
            if item.finish_reason != "length" or len(item.token_ids) != TOKENS:
                outcome.violations.append(f"a rollout of {len(item.token_ids)} tokens, {item.finish_reason}")
            elif exact and item.token_ids != self._known[held[version]][item.prompt_index]:
                outcome.violations.append(
                    f"{item.engine}: tokens that are not those of version {version} ({held[version]}): {item.token_ids}"
                )
        outcome.said.append(f"rollouts of {dict(Counter(i.engine for i in found))}, {pool.counts['moved']} moved")

    def _heal(self, pool: EnginePool, schedule: PoolSchedule, held: dict[int, str], outcome: Outcome) -> None:
        """All engines are there again: the next sync commits on all of them, and all serve."""
        self._recover()
        gone = {None, "lost"} if schedule.on_lost == "remove" else {None}
        for server in self.servers:
            if pool.engines.get(server.url) in gone:
                pool.join(self._joining(server))
        version = self._next()
        receipt = pool.push(self._weights("A"), version=version)
        held[version] = "A"
        if receipt.workers != 3 or set(pool.engines.values()) != {"serving"}:
            outcome.violations.append(f"after healing: {receipt.workers} workers, {pool.engines}")
        self._rollouts(pool, schedule, held, outcome)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _strike(self, pool: EnginePool, fault: PoolFault) -> None:
        if fault.phase != "sync":
            time.sleep(fault.after_s * self.pace.short_s)
        server = self.servers[fault.engine]
        match fault.kind:
            case "killed":
                self._signal(server, fault, signal.SIGKILL)
            case "stopped" | "stopped for long":
                self._signal(server, fault, signal.SIGSTOP)
                time.sleep(self.pace.short_s if fault.kind == "stopped" else self.pace.long_s)
                self._signal(server, fault, signal.SIGCONT)
            case "slow":
                for _ in range(12):
                    self._signal(server, fault, signal.SIGSTOP)
                    time.sleep(self.pace.short_s / 4)
                    self._signal(server, fault, signal.SIGCONT)
                    time.sleep(self.pace.short_s / 20)
            case "leaves":
                pool.leave(server.url)
            case "joins":
                pool.join(self._joining(server))

    def _strike_before(self, pool: EnginePool, fault: PoolFault, strike: threading.Thread) -> bool:
        """Let it happen just before a call of the sync goes to the engine. False if that was lost before, by itself."""
        url = self.servers[fault.engine].url
        adapters = [each for each in pool.sync.engines if each.name == url]
        if not adapters:
            return False
        (adapter,) = adapters
        replies = adapter.replies

        def struck(method, args, timeout_s):
            if method == fault.point and strike.ident is None:
                strike.start()
                time.sleep(self.pace.short_s / 10)
            return replies(method, args, timeout_s)

        adapter.replies = struck
        return True

    def _signal(self, server: PoolServer, fault: PoolFault, number: int) -> None:
        if fault.whole:
            server.signal(number)
            return
        for child in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), number)

    def _recover(self) -> None:
        for server in self.servers:
            server.signal(signal.SIGCONT)
        time.sleep(self.pace.short_s / 3)
        dead = [server for server in self.servers if server.process.poll() is not None or not server.healthy()]
        for server in dead:
            server.close()
            server.start()
        for server in dead:
            server.wait()
        if not dead:
            time.sleep(self.pace.timeout_s)  # leases of what stood still

    def _pool(self, servers: list[PoolServer], **settings: str) -> EnginePool:
        sync = WeightSync([s.url for s in servers], chunk_bytes=1 << 20, timeout_s=self.pace.timeout_s, **settings)
        return EnginePool(sync, self.pace.limits)

    def _joining(self, server: PoolServer) -> Any:
        """As a pool takes it."""
        return server.url

    def _weights(self, name: str) -> list:
        return [*weights(str(DEMO_MODEL), name, True).items()]

    def _next(self) -> int:
        self._version += 1
        return self._version
