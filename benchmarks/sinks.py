"""Cost of sinks to a training step, against that of the run folder alone.

    python -m benchmarks.sinks
    python -m benchmarks.sinks --sink tensorboard --metrics 500

Each set of sinks takes turns in one run. `log`: wall time of one step's calls in the training thread, `RunFolder.log`
and then `Sinks.log`. `threads`: CPU time a step of all other threads of the process, which the sinks' writing takes; as
they share the interpreter's lock with the training thread, it is the most that a step can be held up by. Between two
steps the training thread sleeps, as one does that waits for a GPU. trackio writes into a temporary folder and wandb
works offline, in a process of its own besides: no network.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import machine, spread
from r3.config import SINKS, environment
from r3.diagnostics import RunFolder, open_sinks

NONE = "run folder alone"


def metrics(count: int, step: int) -> dict[str, float]:
    return {f"group_{at % 7}/metric_{at:03d}": step + 1 / (at + 1) for at in range(count)}


def sample(names: list[str], folder: RunFolder, count: int, steps: int, pause_s: float) -> tuple:
    """Median wall time of logging and CPU time of the other threads, us a step; and how many steps a sink lost."""
    sinks = open_sinks(names, run_folder=folder, settings={}, project="benchmark")
    logging_s, process_s, thread_s = [], time.process_time(), time.thread_time()
    for step in range(1, steps + 1):
        found = metrics(count, step)
        start = time.perf_counter()
        folder.log(step, found)
        sinks.log(step, found)
        logging_s.append(time.perf_counter() - start)
        time.sleep(pause_s)
    sinks.close()
    others_s = (time.process_time() - process_s) - (time.thread_time() - thread_s)
    lost = sum(counts.dropped + counts.failed for counts in sinks.counts.values())
    return median(logging_s) * 1e6, others_s / steps * 1e6, lost


def measure(names: list[str], count: int, rounds: int, steps: int, pause_s: float, root: Path) -> dict:
    variants: dict[str, list[str]] = {NONE: [], **{name: [name] for name in names}}
    samples: dict[str, list[tuple]] = {name: [] for name in variants}
    for turn in range(rounds + 1):  # the first one warms up
        order = list(variants)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            folder = RunFolder(root / f"{name.replace(' ', '-')}-{turn}", {})
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                found = sample(variants[name], folder, count, steps, pause_s)
            if turn:
                samples[name].append(found)
    alone = [log for log, _, _ in samples[NONE]]
    return {
        name: {
            "log_us": spread([log for log, _, _ in found]),
            "log_ratio": spread([log / other for (log, _, _), other in zip(found, alone, strict=True)]),
            "threads_us": spread([threads for _, threads, _ in found]),
            "lost": sum(lost for _, _, lost in found),
        }
        for name, found in samples.items()
    }


def show(results: dict) -> None:
    print(f"{'':18}{'log us (p10 to p90)':>26}{'/ alone':>9}{'threads us (p10 to p90)':>28}{'steps lost':>12}")
    for name, row in results.items():
        cells = ""
        for kind, width in (("log_us", 26), ("threads_us", 28)):
            us = row[kind]
            cells += f"{us['median']:.0f} ({us['p10']:.0f} to {us['p90']:.0f})".rjust(width)
            if kind == "log_us":
                cells += f"{row['log_ratio']['median']:9.2f}"
        print(f"{name:18}{cells}{row['lost']:12}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sink", choices=SINKS, action="append", help="default: all")
    parser.add_argument("--metrics", type=int, default=150, help="keys a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="steps in a sample")
    parser.add_argument("--pause-s", type=float, default=0.05, help="between two steps")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    names = options.sink or list(SINKS)
    about = machine(torch.device("cpu")) | {name: version(name) for name in names} | {"metrics": options.metrics}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with tempfile.TemporaryDirectory() as root, environment(WANDB_MODE="offline", TRACKIO_DIR=f"{root}/trackio"):
        results = measure(names, options.metrics, options.rounds, options.steps, options.pause_s, Path(root))
    show(results)
    print(json.dumps({"benchmark": "sinks", **about, "variants": results}))


if __name__ == "__main__":
    main()
