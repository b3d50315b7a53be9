"""Runs schedules of faults against two trainer ranks and three engines, each a process, on a host of its own if that
can be."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import psutil
from fault_outcome import Outcome
from network_hosts import Hosts, can_make_hosts
from pool_harness import PROMPTS, TOKENS, Pace, PoolHarness
from pool_schedules import PoolSchedule
from ports import free_port
from processes import fork_from
from rank_process import RANKS, RankDiedError, RankProcess, RankSettings, digest_of
from ranks_schedules import RanksFault
from server_process import ServerProcess

from r3.errors import SyncError
from r3.pool import PoolLimits

RANKS_PACE = Pace(
    timeout_s=3.0,
    short_s=0.3,
    long_s=5.5,
    push_limit_s=20.0,
    limits=PoolLimits(max_in_flight=1, max_attempts=4, health_every_s=0.1, health_timeout_s=1.0, request_timeout_s=4.5),
)
_ENTRY_S = 4.0
_SECONDS = 1e-3  # of a token
_HANGS_S = 30.0
_ENGINES = 3
_NAMED = re.compile(r"rank \d|http://")


class Trainer:
    """Two ranks that push together; what a harness asks of a pool, the driving one is asked."""

    def __init__(self, settings: RankSettings) -> None:
        self.settings = settings
        self.struck = threading.Event()
        self.start()

    def start(self) -> None:
        self.ranks = [RankProcess(number, self.settings, self.struck.set) for number in range(RANKS)]
        for begun in [rank.ask("begin") for rank in self.ranks]:
            begun.result(_HANGS_S)

    @property
    def alive(self) -> bool:
        return all(rank.alive for rank in self.ranks)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exc: object) -> None:
        for rank in self.ranks:
            rank.close()

    def pushing(self, name: str, version: int, late_s: Sequence[float] = (0.0, 0.0)) -> list[Future]:
        """Each rank's answer, of a push that it comes to `late_s` later."""
        found: list[Future] = []
        order = sorted(range(RANKS), key=lambda number: late_s[number])
        for number in order:
            time.sleep(late_s[number])
            found.append(self.ranks[number].ask("push", name, version))
        return [found[order.index(number)] for number in range(RANKS)]

    def push(self, name: str, *, version: int) -> SimpleNamespace:
        """A push in which nothing may fail."""
        (workers, _), _ = (answer.result(_HANGS_S) for answer in self.pushing(name, version))
        return SimpleNamespace(workers=workers)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], spec: None) -> list:
        names = ("prompt_index", "weight_versions", "finish_reason", "token_ids", "engine")
        found = self.ranks[0].ask("generate", prompts, sampling, spec).result(_HANGS_S)
        return [SimpleNamespace(**dict(zip(names, item, strict=True))) for item in found]

    def join(self, url: str) -> None:
        self.ranks[0].ask("join", url).result(_HANGS_S)

    def leave(self, url: str) -> None:
        self.ranks[0].ask("leave", url).result(_HANGS_S)

    @property
    def state(self) -> dict[str, Any]:
        return self.ranks[0].ask("state").result(_HANGS_S)

    @property
    def engines(self) -> dict[str, str]:
        return self.state["engines"]

    @property
    def counts(self) -> dict[str, int]:
        return self.state["counts"]

    @property
    def version(self) -> int:
        return self.state["version"]


class RanksHarness(PoolHarness):
    """Engines last from schedule to schedule; a trainer is of one schedule."""

    exact = True

    def __init__(self, *, hosts: bool | None = None) -> None:
        super().__init__(RANKS_PACE)
        self._hosts = Hosts(_ENGINES + RANKS) if (can_make_hosts() if hosts is None else hosts) else None
        self._known = {name: [[number] * TOKENS] * PROMPTS for number, name in enumerate("ABC", 1)}
        self._digests = {name: digest_of(name) for name in "ABC"}
        self._port = 20_000
        self._healed = threading.Event()  # the link that was cut last
        self._healed.set()

    def __enter__(self) -> "RanksHarness":
        fork_from("ranks_harness")
        if self._hosts is not None:
            self._stack.enter_context(self._hosts)
        for number in range(_ENGINES):
            port = free_port() if self._hosts is None else 8000
            self.servers.append(ServerProcess(self._host(number), port, self._namespace(number), _SECONDS))
            self._stack.callback(self.servers[-1].close)
        for server in self.servers:
            server.wait()
        self._begin()
        return self

    def _begin(self) -> None:
        """All engines hold the weights A, as every schedule leaves them."""
        with self._pool(self.servers, on_lost="raise") as pool:
            pool.push("A", version=self._next())

    def can_run(self, schedule: PoolSchedule) -> bool:
        """Whether this machine lets links be cut, if that is asked for."""
        return self._hosts is not None or not schedule.fault.kind.startswith("cut off")

    # -- a schedule ---------------------------------------------------------------------------------------------------

    def run(self, schedule: PoolSchedule) -> Outcome:
        outcome = super().run(schedule)
        left = self._processes() - {server.pid for server in self.servers}
        if left:
            outcome.violations.append(f"processes are left: {left}")
            self.violations += 1
        if outcome.violations:
            self._begin()
        return outcome

    def _first_push(self, pool: Trainer, fault: RanksFault) -> None:
        if not fault.first:
            super()._first_push(pool, fault)

    def _push(self, pool: Trainer, schedule: PoolSchedule, held: dict[int, str], outcome: Outcome) -> bool:
        fault, version, late = schedule.fault, self._next(), [0.0, 0.0]
        held[version] = schedule.weights
        if fault.phase == "sync" and fault.kind.startswith("late"):
            late[fault.rank] = self._long(fault)
        strike = None
        if fault.phase == "sync" and not fault.point and not fault.kind.startswith("late"):
            strike = threading.Thread(target=self._strike, args=(pool, fault), daemon=True)
            strike.start()
            time.sleep(self.pace.short_s / 10)
        start, pushing = time.monotonic(), pool.pushing(schedule.weights, version, late)
        results = [self._result(number, answer, outcome) for number, answer in enumerate(pushing)]
        if time.monotonic() - start > self.pace.push_limit_s:
            outcome.violations.append(f"the sync took {time.monotonic() - start:.0f} s")
        if strike is not None:
            strike.join(_HANGS_S)
        if fault.phase == "sync" and fault.point:
            outcome.reached = pool.struck.is_set()
            pool.ranks[fault.rank or 0].ask("hold", "")
        self._judge(pool, results, outcome)
        if fault.rank == 0 and fault.kind.startswith("cut off"):
            self._healed.wait(2 * self.pace.long_s)  # no engine is reached before
        if isinstance(results[0], tuple):
            workers, engines = results[0]
            if workers != engines:
                outcome.violations.append(f"{workers} workers of {engines} engines committed")
            self._check_held(pool, version, schedule.weights, outcome)
        if not pool.ranks[0].alive or pool.state["poisoned"] is not None:
            return False
        states = pool.engines
        if not all(server.held()["serves"] for server in self.servers if server.healthy() and server.url in states):
            outcome.kind += ", paused until then"  # it did not answer the abort in time
            return False
        return any(state == "serving" for state in states.values())  # none where the driving rank was cut off

    def _result(self, number: int, answer: Future, outcome: Outcome) -> tuple[int, int] | Exception | None:
        """Of a rank: what it has committed (None where it does not drive), its error, or its death."""
        try:
            return answer.result(2 * _HANGS_S)
        except Exception as error:
            outcome.said.append(f"rank {number}: {type(error).__name__}: {error}")
            if isinstance(error, TimeoutError):
                outcome.violations.append(f"rank {number} hangs in the sync")
            elif not isinstance(error, RankDiedError | SyncError):
                outcome.violations.append(f"rank {number}: {type(error).__name__}: {error}")
            return error

    def _judge(self, pool: Trainer, results: list, outcome: Outcome) -> None:
        failed = [isinstance(result, Exception) for result in results]
        died = [isinstance(result, RankDiedError) for result in results]
        for number, result in enumerate(results):
            if failed[number] and not died[number] and not _NAMED.search(str(result)):
                outcome.violations.append(f"rank {number}: an error that names no rank and no engine: {result}")
        living = [number for number in range(RANKS) if not died[number]]
        if len({failed[number] for number in living}) > 1:
            outcome.violations.append(f"one rank has committed, the other one not: {results}")
        if any(failed[number] for number in living):
            outcome.kind = "error by name, healed"
        else:
            outcome.kind = "committed"
            states = pool.engines if not failed[0] else {}
            if states and len(states) < _ENGINES:
                outcome.kind += f" on {len(states)}"
        if any(died):
            outcome.kind += " by a new trainer" if "error" in outcome.kind else ", then a rank died"

    def _check_held(self, pool: Trainer, version: int, name: str, outcome: Outcome) -> None:
        engines = pool.engines
        for server in self.servers:
            if server.url not in engines or not server.healthy():
                continue
            held = server.held()
            if (held["version"], held["digest"]) != (version, self._digests[name]):
                outcome.violations.append(f"{server.url}: expected version {version} of weights {name}, got {held}")

    def _heal(self, pool: Trainer, schedule: PoolSchedule, held: dict[int, str], outcome: Outcome) -> None:
        if not pool.alive:
            pool.__exit__()
            self._recover()
            pool.settings = self._settings([server.url for server in self.servers], schedule.on_lost)
            pool.start()
        super()._heal(pool, schedule, held, outcome)
        self._check_held(pool, max(held), "A", outcome)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _strike_before(self, pool: Trainer, fault: RanksFault, strike: threading.Thread) -> bool:
        """Let it happen when the rank, or the one that drives where an engine is struck, is at the point."""
        if not fault.point:
            return True
        rank = pool.ranks[fault.rank or 0]
        rank.ask("hold", fault.point).result(_HANGS_S)
        pool.struck.clear()

        def strike_then_go_on() -> None:
            if pool.struck.wait(_HANGS_S / 3):
                strike.start()
                time.sleep(self.pace.short_s / 10)
                rank.ask("go on")

        threading.Thread(target=strike_then_go_on, daemon=True).start()
        return True

    def _strike(self, pool: Trainer, fault: RanksFault) -> None:
        if fault.kind.startswith("cut off"):
            assert self._hosts is not None
            number = fault.engine if fault.rank is None else _ENGINES + fault.rank
            self._healed.clear()
            self._hosts.cut(number)
            time.sleep(self._long(fault))
            self._hosts.heal(number)
            self._healed.set()
            if fault.kind == "cut off for long":
                time.sleep(self.pace.long_s)  # TCP waits so long before it sends again
        elif fault.rank is None:
            super()._strike(pool, fault)
        else:
            self._strike_rank(pool.ranks[fault.rank], fault)

    def _strike_rank(self, rank: RankProcess, fault: RanksFault) -> None:
        match fault.kind:
            case "killed":
                rank.signal(signal.SIGKILL)
            case "stopped" | "stopped for long":
                rank.signal(signal.SIGSTOP)
                time.sleep(self._long(fault))
                rank.signal(signal.SIGCONT)
            case "slow":
                for _ in range(12):
                    rank.signal(signal.SIGSTOP)
                    time.sleep(self.pace.short_s / 4)
                    rank.signal(signal.SIGCONT)
                    time.sleep(self.pace.short_s / 20)

    def _long(self, fault: RanksFault) -> float:
        return self.pace.long_s if fault.kind.endswith("for long") else self.pace.short_s

    def _signal(self, server: ServerProcess, fault: RanksFault, number: int) -> None:
        server.signal(number, core=not fault.whole)

    # -- processes ----------------------------------------------------------------------------------------------------

    def _pool(self, servers: list[ServerProcess], **settings: str) -> Trainer:
        return Trainer(self._settings([server.url for server in servers], settings["on_lost"]))

    def _settings(self, urls: list[str], on_lost: str) -> RankSettings:
        self._port = free_port() if self._hosts is None else self._port + 1
        return RankSettings(
            hosts=[self._host(_ENGINES + number) for number in range(RANKS)],
            namespaces=[self._namespace(_ENGINES + number) for number in range(RANKS)],
            port=self._port,
            engines=urls,
            on_lost=on_lost,
            timeout_s=self.pace.timeout_s,
            entry_timeout_s=_ENTRY_S,
            limits=self.pace.limits,
        )

    def _host(self, number: int) -> str:
        return "127.0.0.1" if self._hosts is None else self._hosts.addresses[number]

    def _namespace(self, number: int) -> str | None:
        return None if self._hosts is None else self._hosts.namespaces[number]

    def _weights(self, name: str) -> str:
        return name  # each rank has its shards of them

    def _recover(self) -> None:
        for server in self.servers:
            server.signal(signal.SIGCONT)
        time.sleep(self.pace.short_s / 3)
        for server in self.servers:
            if not server.healthy():
                server.close()
                server.start()
        if any(server.held()["state"] not in ("idle", "poisoned") for server in self.servers):
            time.sleep(self.pace.timeout_s)  # leases of what stood still

    def _processes(self) -> set[int]:
        """What runs of the processes that were made here."""
        (forks,) = {psutil.Process(server.pid).ppid() for server in self.servers[:1]}
        return {child.pid for child in psutil.Process(forks).children() if _runs(child)}


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
