"""Runs schedules of faults against one real server, and judges how each ended."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from fault_engine import LONG, QUIET_S, FaultyServer, Load, Output, children, state
from fault_outcome import Outcome, expected, vars_of
from fault_process import TIMEOUT_S, Sender
from places import DEMO_MODEL
from processes import FORKS, fork_from
from schedules import CPU, GPU, Fault, Schedule

from r3.weight_sync import FilesTransport

SHORT_S = 0.7  # how long something stands still that is to go on in time
LONG_S = TIMEOUT_S + 2.0
LIMIT_S = 5 * TIMEOUT_S + 10.0  # a push that takes longer hangs
SMALL_DISK = 6 << 20


class Harness:
    """One server and its senders, from schedule to schedule."""

    def __init__(self, *, gpu: bool = False) -> None:
        self._gpu = gpu
        self._transports = GPU if gpu else CPU
        self._folder = tempfile.TemporaryDirectory()
        self._disk = Path(self._folder.name) / "disk"
        self._disk.mkdir()
        self.mounted = False
        with contextlib.suppress(FileNotFoundError):
            command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "r3-test", str(self._disk)]
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        self._senders: dict[tuple, Sender] = {}
        self.outcomes: list[tuple[Schedule, Outcome]] = []
        self.violations = 0
        self._left: set[Path] = set()
        self._all: list[Sender] = []
        self._load: Load | None = None
        self.server = FaultyServer(gpu=gpu)
        self.version = 0
        self.sent: dict[int | None, str] = {None: "A"}
        self.known: dict[str, list[set[Output]]] = {}
        self._was = "A"

    def __enter__(self) -> "Harness":
        try:
            os.environ["R3_TEST_FAULTS_MODEL"] = str(DEMO_MODEL)
            fork_from("fault_preload")
            for transport in self._transports:
                for delta in (False, True):
                    self._sender(transport, delta)
            self.server.start()
            self._learn()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for sender in self._senders.values():
            sender.end()
        FilesTransport().close()  # removes what killed senders have left, as the next one of this user would
        self.leaked = [one.folder for one in self._all if "r3-sync-" in one.folder and Path(one.folder).exists()]
        self.server.close()
        if self.mounted:
            subprocess.run(["umount", str(self._disk)], check=True)
        self._folder.cleanup()

    def run(self, schedule: Schedule) -> Outcome:
        outcome = Outcome()
        start = time.monotonic()
        self._load = Load(self.server) if schedule.busy else None
        before = self.version
        try:
            self._run(schedule, outcome)
        except Exception as error:
            outcome.kind = outcome.kind or "harness failed"
            outcome.violations.append(f"{type(error).__name__}: {error}")
            self._recover(outcome)
        if self._load is not None:
            self._load.stop()
            allowed = {self.sent[v] for v in range(before + 1, self.version + 1)} | {self._was}
            # A request that a pause has frozen goes on with the new weights: its first token is of the old ones.
            mixed = self.version - before if schedule.on_running == "keep" else 0
            for which, output in self._load.outputs:
                if self._is(output, which, allowed):
                    continue
                mixed -= 1
                if mixed < 0 or not self._is(output[:1], which, allowed):
                    outcome.violations.append(f"while busy, an answer that is of none of {sorted(allowed)}: {output}")
            outcome.said.append(f"busy: {len(self._load.outputs)} answers, {self._load.unanswered} not answered")
        self._was = self.sent[self._committed()]
        self._clean(outcome)
        outcome.seconds = time.monotonic() - start
        self.outcomes.append((schedule, outcome))
        self.violations += bool(outcome.violations)
        return outcome

    def table(self) -> str:
        kinds = Counter(outcome.kind for _, outcome in self.outcomes)
        rows = [f"{len(self.outcomes)} schedules: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())]
        by_fault: dict[str, Counter] = {}
        for schedule, outcome in self.outcomes:
            for fault in schedule.faults or (Fault(kind="none"),):
                by_fault.setdefault(fault.kind, Counter())[outcome.kind] += 1
        rows += [
            f"  {fault:16} " + ", ".join(f"{n} {k}" for k, n in by_fault[fault].items()) for fault in sorted(by_fault)
        ]
        missed = sum(not outcome.reached for _, outcome in self.outcomes)
        rows.append(f"{missed} in which no fault was reached; {self.violations} with violations")
        rows += [f"  {schedule}: {v[:300]}" for schedule, o in self.outcomes for v in o.violations]
        return "\n".join(rows)

    # -- a schedule ---------------------------------------------------------------------------------------------------

    def _run(self, s: Schedule, outcome: Outcome) -> None:
        self._stood: dict[int, float] = {}
        kinds = {fault.kind for fault in s.faults}
        workers = [vars_of(f) for f in s.faults if f.kind.startswith("worker")]
        self.server.rpc("r3_test_arm", workers, timeout_s=30)
        sender = self._sender(s.transport, s.delta, small="disk full" in kinds)
        version = self._committed() if "old version" in kinds else self._next(s.weights)
        self._order(sender, s, version, faults=[f for f in s.faults if not f.kind.startswith("worker")])
        others: list[Sender] = []
        if "two at once" in kinds:
            time.sleep(0.4 * s.faults[0].pick)
            others.append(self._second(s))
        deadline = time.monotonic() + LIMIT_S + (2 * LONG_S if s.long else 0)
        went_on = False
        while not (sender.poll() and all(other.poll() for other in others)):
            self._let_workers_go_on(s)
            waiting = sender.stopped() or (sender.holds() and not went_on)
            if waiting and self._stands(sender, s):
                # Another one begins meanwhile: it is turned away, or takes over.
                if not others:
                    began = time.monotonic()
                    others.append(self._second(s))
                    deadline += time.monotonic() - began
                late = time.monotonic() - self._stood[sender.process.pid] > 2 * LONG_S
                if others[0].poll() or others[0].holds() or late:
                    os.kill(sender.process.pid, signal.SIGCONT)
                    if sender.holds() and not went_on:
                        sender.go_on()
                    went_on = True
                    continue
            if went_on and others and others[0].holds() and not others[0].told and others[0].reply is None:
                self._probe_half_loaded(outcome, sender)
                others[0].go_on()
            if time.monotonic() > deadline:
                stacks = [one.stacks()[-2800:] for one in (sender, *others) if one.reply is None]
                outcome.violations.append(f"hang: {sender.reply} {sender.events} {[o.reply for o in others]} {stacks}")
                self._recover(outcome)
                break
        self._let_workers_go_on(s, now=True)
        if self._load is not None:
            self._load.stop()
        self._judge(s, outcome, sender, others)

    def _probe_half_loaded(self, outcome: Outcome, late: Sender) -> None:
        """Whoever took over is in the middle of its sync while the first sender goes on where it stood."""
        until = time.monotonic() + 1.5
        while not late.poll() and time.monotonic() < until:
            pass
        states = {reply["state"] for reply in self.server.rpc("r3_status", timeout_s=10)}
        if self.server.ask(0, timeout_s=QUIET_S) is not None and states == {"open"}:
            outcome.violations.append("serves while a sync is open: the sender that was late has resumed the engine")

    def _judge(self, s: Schedule, outcome: Outcome, sender: Sender, others: list[Sender]) -> None:
        alive = self._engine_lives(s, outcome)
        happened = list(sender.events)
        touched: list[int] = []
        if alive:
            done = self.server.rpc("r3_test_done", timeout_s=30)
            happened += [event for reply in done for event in reply["done"]]
            touched = [reply["rank"] for reply in done if reply["touched"]]
        replies = [one.reply or ("hangs", {"text": ""}) for one in (sender, *others)]
        for kind, what in replies:
            outcome.said.append(f"{kind}: {what.get('text') or what} {what.get('notes') or ''}")
        struck = {e["kind"] for e in happened}
        outcome.reached = bool(struck) or any(
            f.kind in ("old version", "two at once", "worker killed") for f in s.faults
        )
        self._check_text(s, outcome, replies[0], happened)
        for one in (sender, *others):
            if one.seconds > LIMIT_S + (3 * LONG_S if one.stopped or one.holds() else 0):
                outcome.violations.append(f"took {one.seconds:.1f} s to end")
        if not alive:
            outcome.kind = "restarted"
            self.server.stop()
            if self.server.left:
                outcome.said.append(f"processes of the engine outlived it: {self.server.left}")
            self.server.start()
            self.sent[None] = "A"
            self._heal(s, outcome)
            return
        status = self.server.rpc("r3_status", timeout_s=30)
        if wrong := [reply for reply in status if reply["rank"] in touched and reply["state"] in ("idle", "committed")]:
            outcome.violations.append(f"loaded into and not committed, but {wrong}")
        committed = [what for kind, what in replies if kind == "committed"]
        versions, states = {r["version"] for r in status}, {r["state"] for r in status}
        answer = self.server.serves(0)
        if answer is not None:
            right = self.sent.get(next(iter(versions)))
            # Reserved: no weight has been touched, and the engine was not paused yet.
            if states not in ({"idle"}, {"committed"}, {"reserved"}) or len(versions) > 1:
                outcome.violations.append(f"serves while the workers are {status}")
            elif not self._is(answer, 0, {right}):
                outcome.violations.append(f"serves {self._whose(answer, 0)} while version {versions} is {right}")
        if len(committed) == len(replies):
            outcome.kind = "committed"
            self._check_serves(outcome)
            return
        if answer is None and committed and states == {"idle"} and versions == {self._last(replies)}:
            outcome.violations.append("the engine is healthy, and paused: by a sender that another has taken over from")
        if answer is None:
            outcome.kind = "poisoned, healed" if "poisoned" in states else "paused, healed"
        elif committed:
            outcome.kind = "committed by one"
            self._check_serves(outcome)
            return
        else:
            outcome.kind = "refused"
        self._heal(s, outcome)

    @staticmethod
    def _last(replies: list[tuple[str, dict]]) -> int | None:
        return max((what["version"] for kind, what in replies if kind == "committed"), default=None)

    def _check_text(self, s: Schedule, outcome: Outcome, reply: tuple[str, dict], happened: list[dict]) -> None:
        kind, what = reply
        if kind != "failed":
            return
        if what["error"] not in ("SyncError", "InjectedError"):
            outcome.violations.append(f"expected a SyncError, got {what['error']}: {what['text'][:500]}")
        text = what["text"]
        wanted = [one for f in s.faults if (one := expected(f, happened)) is not None]
        if wanted and not any(all(re.search(p, text, re.DOTALL) for p in one) for one in wanted):
            outcome.violations.append(f"the error names none of {wanted}: {text[:800]}")

    def _heal(self, s: Schedule, outcome: Outcome) -> None:
        """The next complete sync, of whoever sends next, makes all right."""
        deadline = time.monotonic() + LONG_S + 10.0
        while True:
            sender = self._sender(s.transport, s.delta)
            sender.order(version=self._next(s.weights), weights=s.weights, fused=s.fused, faults=[], timeout_s=15.0)
            while not sender.poll(0.1):
                if time.monotonic() > deadline + 60:
                    outcome.violations.append(f"the healing sync hangs: {sender.stacks()[-2800:]}")
                    self._recover(outcome)
                    return
            kind, what = sender.reply
            if kind == "committed":
                break
            if "another can begin in" in what["text"] and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            outcome.violations.append(f"not healed: {kind}: {what}")
            self._recover(outcome)
            return
        self._check_serves(outcome)

    def _check_serves(self, outcome: Outcome) -> None:
        status = self.server.rpc("r3_status", timeout_s=30)
        versions = {reply["version"] for reply in status}
        if {reply["state"] for reply in status} != {"idle"} or len(versions) > 1:
            outcome.violations.append(f"committed, but {status}")
        right = self.sent.get(next(iter(versions)))
        for which in (0, 1):
            answer = self.server.serves(which)
            if answer is None:
                outcome.violations.append("committed, but does not serve")
                self._recover(outcome)
                return
            if not self._is(answer, which, {right}):
                outcome.violations.append(f"committed {right}, but serves {self._whose(answer, which)}: {answer[:3]}")

    # -- senders and workers ------------------------------------------------------------------------------------------

    def _sender(self, transport: str, delta: bool, *, small: bool = False) -> Sender:
        key = (transport, delta, small)
        sender = self._senders.get(key)
        if sender is None or not sender.alive():
            folder = str(self._disk) if small else None
            settings = {"url": self.server.url, "path": str(DEMO_MODEL), "transport": transport, "delta": delta}
            stacks = Path(self._folder.name) / f"stacks-{len(self._all)}"
            settings |= {"gpu": self._gpu, "folder": folder, "stacks": str(stacks)}
            sender = self._senders[key] = Sender(FORKS, settings)
            self._all.append(sender)
        return sender

    def _order(self, sender: Sender, s: Schedule, version: int | None, faults: list[Fault]) -> None:
        sender.order(version=version, weights=s.weights, fused=s.fused, faults=faults, on_running=s.on_running)

    def _second(self, s: Schedule) -> Sender:
        """A sync by another process, of another set of weights."""
        other = self._transports[s.transport == self._transports[0]]
        sender = self._sender(other, s.delta)
        weights = {"A": "B", "B": "C", "C": "A"}[s.weights]
        # Half of those that take over are themselves in the middle when the first one goes on.
        middle = s.faults[0].pick < 0.5 and s.faults[0].kind in ("held", "sender stopped")
        faults = [Fault(kind="held", point="load:3", when="before")] if middle else []
        sender.order(
            version=self._next(weights), weights=weights, fused=s.fused, faults=faults, on_running=s.on_running
        )
        return sender

    def _stands(self, sender: Sender, s: Schedule) -> bool:
        """Whether it has stood still for as long as it should before another begins."""
        since = self._stood.setdefault(sender.process.pid, time.monotonic())
        return time.monotonic() - since > (LONG_S if s.long else SHORT_S)

    def _let_workers_go_on(self, s: Schedule, *, now: bool = False) -> None:
        for pid in self.server.workers.values():
            if state(pid) == "T":
                since = self._stood.setdefault(pid, time.monotonic())
                if now or time.monotonic() - since > (LONG_S if s.long else SHORT_S):
                    os.kill(pid, signal.SIGCONT)

    def _engine_lives(self, s: Schedule, outcome: Outcome) -> bool:
        if self.server.healthy() and all(state(pid) for pid in self.server.workers.values()):
            return True
        if not any(f.kind == "worker killed" for f in s.faults):
            said = [line for line in self.server.log.read_text().splitlines() if "Error" in line]
            outcome.violations.append(f"the engine has died by itself: {said[:8]}")
        return False

    def _recover(self, outcome: Outcome) -> None:
        """After a violation, from the start: the next schedule must not pay for it."""
        if self._load is not None:
            self._load.stop()
        for sender in self._senders.values():
            sender.process.kill()
            sender.end()
        self._senders.clear()
        self.server.stop()
        self.server.start()
        self.sent[None] = "A"

    def _next(self, weights: str) -> int:
        self.version += 1
        self.sent[self.version] = weights
        return self.version

    def _committed(self) -> int | None:
        return self.server.rpc("r3_status", timeout_s=30)[0]["version"]

    # -- what is right ------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """What the engine says under each set of weights, with its caches empty and full."""
        for weights, fused in (("B", False), ("C", True), ("A", False)):
            sender = self._sender(self._transports[0], False)
            sender.order(version=self._next(weights), weights=weights, fused=fused, faults=[], timeout_s=30.0)
            while not sender.poll(0.1):
                pass
            assert sender.reply is not None
            assert sender.reply[0] == "committed", sender.reply
            self.known[weights] = [{self._ask_long(which) for _ in range(2)} for which in (0, 1)]
        firsts = [next(iter(self.known[weights][which]))[:6] for weights in "ABC" for which in (0, 1)]
        assert len(set(firsts)) == 6, "sets of weights that cannot be told apart"

    def _ask_long(self, which: int) -> Output:
        output = self.server.ask(which, LONG, timeout_s=60.0)
        assert output is not None
        return output

    def _is(self, output: Output, which: int, allowed: set[str | None]) -> bool:
        known = [one for weights in allowed if weights for one in self.known[weights][which]]
        return any(one[: len(output)] == output for one in known)

    def _whose(self, output: Output, which: int) -> str:
        return next((f"outputs of {w}" for w in self.known if self._is(output, which, {w})), "outputs of no set")

    def _clean(self, outcome: Outcome) -> None:
        """No process and no memory is left of what has ended, and nothing between syncs."""
        living = {s.process.pid for s in self._senders.values() if s.alive()}
        for pid in living:
            if found := children(pid):
                outcome.violations.append(f"sender {pid} has children {found}")
        for chunk in (*Path("/dev/shm").glob("r3-sync-*/*"), *self._disk.iterdir()):
            with contextlib.suppress(OSError):
                mine = chunk.suffix in (".safetensors", ".partial") and int(chunk.name.split("-")[1]) in self._mine()
                if mine and chunk not in self._left:
                    outcome.violations.append(f"left in shared memory: {chunk}")
                    self._left.add(chunk)

    def _mine(self) -> set[int]:
        return {s.process.pid for s in self._senders.values()}
