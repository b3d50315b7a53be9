"""Does replay keep training stable? GRPO with the demo's model, live and replayed, with and without TIS, 3 seeds each.

    python -m benchmarks.stability --parallel 8             # all 24 runs of 200 steps, on one GPU
    python -m benchmarks.stability --limit-s 540            # what is not done goes on with the next call
    python -m benchmarks.stability --summary                # of the runs that have ended

Each run is the demo's job (`examples/grpo_demo.py`) in a process of its own, from a checkpoint that solves some chain
sums: 16 problems of 8 rollouts a step, 4 updates a step, rollouts 1 or 4 versions old. Only the routing and the
correction differ: `live` or `replayed`, plain or with importance weights truncated at 2 (`tis`). Runs go side by side,
and one that was ended goes on from its last checkpoint.

One JSON line for each way and age of rollouts, over its seeds: reward in the first and the last tenth of the steps, in
the best tenth, and by seed; k3, in nats, and the share of extreme tokens (ratio over 2), of the same rollouts live and
replayed, whichever it trains with, as means of all steps; the largest k3 of any step of the routing that it trains
with; gradient norm, median and largest; and how many seeds collapsed: reward in the last tenth under half of that in
the best tenth. `--figure` draws reward, k3 and gradient norm over the steps.

It checks itself: each run has every step once, was synced after each, replayed rows or did not, and trained on rollouts
that are as old as was asked, but for the first steps.

Predicted before the first whole run: k3 8e-4 live and 6e-5 replayed at first, and twice that at the end, more with
rollouts 4 versions old, since the trainer has moved; extreme tokens 10 times fewer replayed. This model is small and
its gap too: no way collapses, rewards of the four differ by less than seeds do, and TIS makes no difference to
replayed runs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.machine import machine
from r3.diagnostics import read_metrics

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "grpo_demo.py"
ROUTINGS, CORRECTIONS, AGES = ("live", "replayed"), ("none", "tis"), (1, 4)
APART_S = 5.0  # between the starts of two engines, which load and compile on all cores
TRIES = 3


@dataclass(frozen=True)
class Run:
    """One of the runs: its settings are all but for `steps` in its name."""

    routing: str
    correction: str
    age: int
    seed: int

    @property
    def way(self) -> str:
        return self.routing + ("" if self.correction == "none" else f", {self.correction}")

    def folder(self, options: argparse.Namespace) -> Path:
        return options.folder / f"{self.routing}-{self.correction}-{self.age}-{self.seed}"

    def records(self, options: argparse.Namespace) -> list[dict[str, Any]]:
        folder = self.folder(options)
        return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []

    def ended(self, options: argparse.Namespace) -> bool:
        return len(self.records(options)) >= options.steps

    def command(self, options: argparse.Namespace) -> list[str]:
        settings = {
            "trainer.output_dir": self.folder(options),
            "trainer.max_steps": options.steps,
            "trainer.seed": self.seed,
            "trainer.max_staleness": self.age,
            "trainer.algorithm.correction": self.correction,
            "trainer.policy.fsdp_config.moe_enable_routing_replay": str(self.routing == "replayed").lower(),
            "trainer.policy.optimizer_config.lr": options.lr,
            "trainer.train_batch_size": options.problems,
            "trainer.save_every": options.save_every,
            "trainer.resume_from": "auto",
            "trainer.save_hf": "false",
            "generator.inference_engine.enforce_eager": "false" if torch.cuda.is_available() else "true",
            "generator.inference_engine.gpu_memory_utilization": 0.05,  # what must be free
            "generator.inference_engine.kv_cache_gib": 0.5,  # all rollouts; nothing is measured while other runs end
            "generator.inference_engine.weight_sync.chunk_mib": 64,  # the whole model
            "generator.sampling_params.max_generate_length": options.length,
        }
        return [sys.executable, "-W", "ignore", str(EXAMPLE), *(f"{name}={value}" for name, value in settings.items())]


class Starts:
    """Lets one engine start at a time, some seconds apart, until `over` is set."""

    def __init__(self, apart_s: float) -> None:
        self.over = False
        self._lock, self._apart_s, self._next = threading.Lock(), apart_s, 0.0

    def wait(self) -> None:
        with self._lock:
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = time.monotonic() + self._apart_s


def perform(run: Run, options: argparse.Namespace, starts: Starts, until: float) -> None:
    """Run it to its end, or to `until`; what a run says is in a log beside its folder."""
    for _ in range(TRIES):
        if run.ended(options):
            return
        starts.wait()
        if starts.over or time.monotonic() > until:
            return
        with open(f"{run.folder(options)}.log", "a") as log:
            process = subprocess.Popen(run.command(options), stdout=log, stderr=subprocess.STDOUT)
            try:
                process.wait(timeout=max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # it ends its engine
                process.wait()
                return
    if not run.ended(options):
        print(json.dumps({"run": run.folder(options).name, "failed": TRIES}), flush=True)


def check(run: Run, records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Raises `SystemExit` if this run is not what its name says."""
    name, steps = run.folder(options).name, [record["step"] for record in records]
    if steps != list(range(1, options.steps + 1)):
        raise SystemExit(f"stability: expected steps 1 to {options.steps} of {name}, got {len(steps)} of them")
    for record in records:
        if record["sync/version"] != record["step"]:
            raise SystemExit(f"stability: step {record['step']} of {name} was not synced")
        if (record["routing/rows_replayed"] > 0) != (run.routing == "replayed"):
            raise SystemExit(f"stability: step {record['step']} of {name} is not {run.routing}")
    ages = [record["routing/version_lag_max"] for record in records]
    if max(ages) != run.age or median(ages) != run.age:
        raise SystemExit(f"stability: expected rollouts {run.age} versions old in {name}, got {median(ages)}")


def parts(values: list[float]) -> list[float]:
    """Means of tenths, in order."""
    size = max(1, len(values) // 10)
    return [mean(values[at : at + size]) for at in range(0, len(values) - size + 1, size)]


def collapsed(rewards: list[float]) -> bool:
    tenths = parts(rewards)
    return not all(map(math.isfinite, rewards)) or tenths[-1] < max(tenths) / 2


def summary(run: Run, seeds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    def of(key: str) -> list[list[float]]:
        return [[record[key] for record in records] for records in seeds]

    def over(key: str) -> float:
        return mean(value for values in of(key) for value in values)

    rewards, norms = of("reward/mean"), of("train/grad_norm")
    figures = {
        "reward_first": mean(parts(values)[0] for values in rewards),
        "reward_last": mean(parts(values)[-1] for values in rewards),
        "reward_best": mean(max(parts(values)) for values in rewards),
        "k3_live": over("logprob_diff/live/k3"),
        "k3_replayed": over("logprob_diff/replayed/k3"),
        "k3_largest": max(max(values) for values in of(f"logprob_diff/{run.routing}/k3")),
        "extreme_live": over("logprob_diff/live/extreme_frac"),
        "extreme_replayed": over("logprob_diff/replayed/extreme_frac"),
        "grad_norm": median(value for values in norms for value in values),
        "grad_norm_largest": max(max(values) for values in norms),
    }
    line: dict[str, Any] = {"way": run.way, "versions_old": run.age, "seeds": len(seeds)}
    line |= {name: float(f"{value:.3g}") for name, value in figures.items()}
    line["reward_last_by_seed"] = [round(parts(values)[-1], 3) for values in rewards]
    return line | {"collapsed": sum(map(collapsed, rewards))}


PANELS = {
    "reward, mean of a step": lambda run: ("reward/mean", False),
    "k3 of the routing trained with, nats": lambda run: (f"logprob_diff/{run.routing}/k3", True),
    "gradient norm": lambda run: ("train/grad_norm", True),
}


def draw(ended: dict[Run, list[dict[str, Any]]], path: Path) -> None:
    """A column for each age of rollouts; each way is the mean of its seeds over 10 steps, between their extremes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 9), layout="constrained")
    axes = drawn.subplots(len(PANELS), len(AGES), sharex=True, sharey="row", squeeze=False)
    colours = {"live": "#d55e00", "replayed": "#0072b2"}
    for (row, (title, chosen)), (column, age) in product(enumerate(PANELS.items()), enumerate(AGES)):
        panel = axes[row][column]
        for routing, correction in product(ROUTINGS, CORRECTIONS):
            found = {run: records for run, records in ended.items() if run == Run(routing, correction, age, run.seed)}
            if not found:
                continue
            key, log = chosen(next(iter(found)))
            curves = torch.tensor([[record[key] for record in records] for records in found.values()])
            window = min(10, curves.shape[1])
            smooth = torch.nn.functional.avg_pool1d(curves[:, None], window)[:, 0]
            steps = (window + 1) / 2 + window * torch.arange(smooth.shape[1])
            dash = "-" if correction == "none" else "--"
            panel.plot(steps, smooth.mean(0), dash, color=colours[routing], label=next(iter(found)).way)
            panel.fill_between(steps, smooth.amin(0), smooth.amax(0), color=colours[routing], alpha=0.12, linewidth=0)
            if log:
                panel.set_yscale("log")
        panel.set_title(f"{title}; rollouts {age} version{'s' * (age > 1)} old", fontsize=9)
        panel.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=100, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ages", nargs="+", type=int, default=AGES, choices=AGES, help="of rollouts, in versions")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--problems", type=int, default=16, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="most sampled tokens of a rollout")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--parallel", type=int, default=8, help="runs at a time")
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="end what is not done by then")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "r3-stability")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--summary", action="store_true", help="start no run")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(machine(device) | {"steps": options.steps, "lr": options.lr}), flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    # Whole sets of ways first: a seed that is done for all of them can be compared.
    runs = [
        Run(routing, correction, age, seed)
        for seed, age, correction, routing in product(options.seeds, options.ages, CORRECTIONS, ROUTINGS)
    ]
    if not options.summary:
        starts, until = Starts(APART_S), time.monotonic() + options.limit_s
        with ThreadPoolExecutor(options.parallel) as pool:
            try:
                list(pool.map(lambda run: perform(run, options, starts, until), runs))
            except KeyboardInterrupt:
                starts.over = True  # what runs has had the Ctrl-C too
                pool.shutdown(cancel_futures=True)
                raise
    ended = {run: run.records(options) for run in runs if run.ended(options)}
    for run, records in ended.items():
        check(run, records, options)
    for age, correction, routing in product(options.ages, CORRECTIONS, ROUTINGS):
        if seeds := [run for run in ended if run == Run(routing, correction, age, run.seed)]:
            print(json.dumps(summary(seeds[0], [ended[run] for run in seeds])), flush=True)
    if options.figure and ended:
        draw(ended, options.figure)
    if missing := [run.folder(options).name for run in runs if run not in ended]:
        raise SystemExit(f"stability: {len(missing)} of {len(runs)} runs have not ended: {', '.join(missing)}")


if __name__ == "__main__":
    main()
