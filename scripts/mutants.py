"""Mutation testing: changes the code a little, one place at a time, and runs the tests that come by it until one fails.

    python scripts/mutants.py [--jobs N] [--each SECONDS] [--tests FILE]... [r3.routing.wire.*]

mutmut makes the mutants, keeps their results in mutants/ and shows them; its settings are in pyproject.toml. Its own
run collects the tests anew for each mutant, half a minute here: this collects them once, and forks. What has been
killed is not run again, what survived is.
"""

import argparse
import collections
import contextlib
import gc
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mutmut.__main__ as mutmut
import pytest
from mutmut.configuration import config
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd, copy_also_copy_files, copy_src_dir, setup_source_paths
from mutmut.utils.format_utils import mangled_name_from_mutant_name

KILLED, SURVIVED, NO_TESTS, SUSPICIOUS, TIMEOUT = 1, 0, 33, 35, 36  # exit codes, as mutmut keeps them
MEMORY = 16 << 30  # bytes more that a mutant may take: it may be an endless loop that collects


def in_forks(
    jobs: Iterable[str], most: int, limit_s: Callable[[str], float], body: Callable[[str], Any]
) -> Iterator[tuple[str, Any, bool]]:
    """(job, what `body` of it returned or None if its process died, whether that took too long), as they end."""
    waiting, running = collections.deque(jobs), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    job = waiting.popleft()
                    path = Path(folder, str(len(waiting)))
                    running[fork(body, job, path)] = (job, path, time.monotonic() + limit_s(job))
                for pid, (job, path, end) in list(running.items()):
                    late = time.monotonic() > end
                    if late:
                        kill(pid)
                    if os.waitpid(pid, 0 if late else os.WNOHANG)[0]:
                        kill(pid)  # processes that its tests have left
                        del running[pid]
                        yield job, json.loads(path.read_text()) if path.exists() and not late else None, late
                time.sleep(0.005)
        finally:
            for pid in running:
                kill(pid)


def fork(body: Callable[[str], Any], job: str, path: Path) -> int:
    """A process, in a group of its own, that writes what `body(job)` returns to `path`."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # it may have done so itself
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
        path.write_text(json.dumps(body(job)))
    finally:
        os._exit(0)


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Mutants:
    """A plugin of pytest that runs the mutants in place of the tests."""

    def __init__(self, patterns: list[str], jobs: int, each_s: float) -> None:
        self.patterns, self.jobs, self.each_s = patterns, jobs, each_s
        self.failed, self.items = False, dict[str, pytest.Item]()
        self.seconds: dict[str, float] = {}
        self.by_function: dict[str, list[str]] = collections.defaultdict(list)
        self.killers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        session.config._tmp_path_factory.getbasetemp()  # pyrefly: ignore  # one for all forks
        gc.freeze()  # a collection in a fork would copy every page
        self.find_tests()
        self.run_mutants()
        return True  # in place of pytest's own loop

    def find_tests(self) -> None:
        """Each test once, without a mutant: which functions it comes by. What fails so is left out."""
        for nodeid, found, _ in in_forks(self.items, self.jobs, lambda _: 120.0, self.run_clean):
            if found is None:
                print(f"left out, since it fails without a mutant: {nodeid}")
                continue
            self.seconds[nodeid], functions = found
            for function in functions:
                self.by_function[function].append(nodeid)
        print(f"{len(self.seconds)} of {len(self.items)} tests, {sum(self.seconds.values()):.0f} s")

    def run_clean(self, nodeid: str) -> tuple[float, list[str]] | None:
        set_mutant_under_test("stats")
        state()._stats.clear()
        began = time.monotonic()
        return None if self.first_to_fail([nodeid]) else (time.monotonic() - began, sorted(state()._stats))

    def run_mutants(self) -> None:
        with change_cwd(".."):
            found, _ = mutmut.collect_source_file_mutation_data(mutant_names=self.patterns)
        tested = {name for _, name, _ in found if mangled_name_from_mutant_name(name) in self.by_function}
        results = {name: code if name in tested else NO_TESTS for _, name, code in found}
        waiting = [name for name, code in results.items() if code not in (KILLED, NO_TESTS)]
        for done, (name, killer, late) in enumerate(in_forks(waiting, self.jobs, self.limit_s, self.killer_of), 1):
            if killer:
                self.killers[mangled_name_from_mutant_name(name)][killer] += 1
            results[name] = TIMEOUT if late else SUSPICIOUS if killer is None else KILLED if killer else SURVIVED
            if done % 100 == 0 or done == len(waiting):
                print(f"{done} of {len(waiting)} mutants", flush=True)
                self.save(found, results)
        self.save(found, results)
        alive = [name for name, code in results.items() if code not in (KILLED, TIMEOUT)]
        print("not killed:", *alive, sep="\n    ")
        late, killed = list(results.values()).count(TIMEOUT), len(found) - len(alive)
        print(f"{killed} of {len(found)} killed ({killed / len(found):.1%}), {late} of them by taking too long")

    def save(self, found: list[tuple[Any, str, int | None]], results: dict[str, int | None]) -> None:
        with change_cwd(".."):
            for data, name, _ in found:
                data.exit_code_by_key[name] = results[name]
            for data in {id(data): data for data, *_ in found}.values():
                data.save()

    def tests_of(self, name: str) -> list[str]:
        """Tests that come by the mutant, for `each_s`: those that killed others of its function, then one case of each
        test function after the other, the shortest first."""
        function = mangled_name_from_mutant_name(name)
        cases: collections.Counter[str] = collections.Counter()
        ranked = []
        for nodeid in sorted(self.by_function[function], key=self.seconds.__getitem__):
            cases[test := nodeid.partition("[")[0]] += 1
            ranked.append((-self.killers[function][nodeid], cases[test], self.seconds[nodeid], nodeid))
        *_, seconds, nodeids = zip(*sorted(ranked), strict=True)
        fitting = sum(end <= self.each_s for end in itertools.accumulate(seconds))
        return list(nodeids[: max(1, fitting)])

    def killer_of(self, name: str) -> str:
        set_mutant_under_test(name)
        return self.first_to_fail(self.tests_of(name))

    def limit_s(self, name: str) -> float:
        return 30.0 + 5.0 * sum(map(self.seconds.__getitem__, self.tests_of(name)))

    def first_to_fail(self, nodeids: list[str]) -> str:
        """Runs tests until one fails: that one, or empty."""
        items = [self.items[nodeid] for nodeid in nodeids]
        for item, following in zip(items, [*items[1:], None], strict=True):
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            except BaseException:
                self.failed = True
            if self.failed:
                return item.nodeid
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default: 2)")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of tests for a mutant (default: 60)")
    parser.add_argument("--tests", action="append", help="a file of tests (default: all those in pyproject.toml)")
    parser.add_argument("patterns", nargs="*", help="names of mutants, with wildcards (default: all)")
    args = parser.parse_args()
    # Before torch is imported. A fork must not wait for threads of its parent's.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PY_IGNORE_IMPORTMISMATCH": "1"}
    os.environ["PYTEST_XDIST_WORKER_COUNT"] = str(os.cpu_count())  # tests/conftest.py: one thread a test
    Path("mutants").mkdir(exist_ok=True)
    for step in (copy_src_dir, copy_also_copy_files, setup_source_paths):
        step()
    print("mutants made:", mutmut.create_mutants(args.jobs))
    words = [*config().pytest_add_cli_args, *(args.tests or config().pytest_add_cli_args_test_selection)]
    os.chdir("mutants")
    return pytest.main(["-q", "-s", *words], plugins=[Mutants(args.patterns, args.jobs, args.each)])


if __name__ == "__main__":
    sys.exit(main())
