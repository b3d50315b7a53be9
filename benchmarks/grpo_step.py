"""Seconds and memory of a whole GRPO step: r3's own trainer, TRL's, and what the engine and the model take alone.

    python -m benchmarks.grpo_step                              # a GPU: 1.25 billion parameters, 256 rollouts of 1,024
    python -m benchmarks.grpo_step --small                      # a CPU: that it runs, not what it takes
    python -m benchmarks.grpo_step --other ../r3-before         # and the r3 of another checkout

Each side is a process of its own; they take turns `--rounds` times. The first step, which starts CUDA graphs and
allocators, is left out; of the others the median counts. Sides:

    r3       this checkout's trainer: prompts in, synced engine out
    inside   the same, with the engine in the trainer's own process (the peak is then of both)
    ahead    the same as `r3`, with the next step's rollouts sampled while one trains: `rollout` is the wait for them
    other    the same, of the checkout that `--other` names
    trl      TRL's GRPOTrainer with the same numbers
    limit    a bare engine's tokens (no capture, no log-probabilities, no text) and a bare forward and backward of the
             model without its head, gradients checkpointed, in bfloat16: no trainer can be faster with these parts

Stages, in seconds: `rollout` with rewards, `train` (TRL: with the log-probabilities that it computes anew), `sync`.
Peak memory is of the trainer's process, of all steps; r3's of its updates and its syncs, each by itself.

Predicted for one H200, of r3's step: inside 0.75 (an engine's step 6 ms instead of 10), ahead 0.8, TRL's 1.6; so the
better of the two is 0.45 to 0.5 of TRL's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.trl_step import LARGE, SMALL, StepTimes, checkpoint, settings_of

OF_R3 = {
    "r3": [],
    "inside": ["generator.inference_engine.weight_sync.transport=in_process"],
    "ahead": ["trainer.max_staleness=1"],
}
SIDES = (*OF_R3, "other", "trl", "limit")


def text(size: dict[str, Any], number: int) -> str:
    return " ".join(f"w{2 + (number * 31 + j) % (size['vocab'] - 2)}" for j in range(size["prompt"]))


def reward(completion: str) -> float:
    return float(len(set(completion.split())))


class Words:
    """A task whose reward is how many different words a completion has."""

    def __init__(self, size: dict[str, Any]) -> None:
        self.size = size

    def problems(self, step: int, count: int) -> list[str]:
        return [text(self.size, step * count + i) for i in range(count)]

    def prompt(self, problem: str) -> str:
        return problem

    def reward(self, problem: str, completion: str) -> float:
        return reward(completion)


def r3_side(folder: str, size: dict[str, Any], steps: int, more: list[str]) -> dict[str, Any]:
    import r3
    from r3.capture import running_engine
    from trainer_hooks.grpo import GRPOTrainer
    from trainer_hooks.launch import process_group
    from trainer_hooks.policy import Policy

    gpu = torch.cuda.is_available()
    settings = {
        "trainer.train_batch_size": size["prompts"],
        "trainer.micro_train_batch_size": size["micro_batch"],
        "trainer.diagnostics.every": 0,
        "trainer.diagnostics.alarms.enabled": "false",
        "generator.n_samples_per_prompt": size["samples"],
        "generator.sampling_params.max_generate_length": size["tokens"],
        "generator.inference_engine.max_model_len": size["prompt"] + size["tokens"],
        "generator.inference_engine.max_num_seqs": size["prompts"] * size["samples"],
        "generator.inference_engine.enforce_eager": str(not gpu).lower(),
        "generator.inference_engine.gpu_memory_utilization": size["memory"],
        "generator.inference_engine.weight_sync.transport": "ipc" if gpu else "files",
    }
    config = r3.R3Config.from_overrides(
        [*(f"{name}={value}" for name, value in settings.items()), *more], {"trainer.policy.model.path": folder}
    )
    found: list[dict[str, float]] = []
    peaks: dict[str, float] = {}

    def peaked(stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reset_peak()
            result = run(*args, **kwargs)
            peaks[stage] = max(peaks.get(stage, 0.0), peak())
            return result

        return call

    with process_group():
        policy = Policy(config)
        with running_engine(config) as engine:
            trainer = GRPOTrainer(config, Words(size), policy, engine)
            for stage in ("update", "push"):
                setattr(trainer, stage, peaked(stage, getattr(trainer, stage)))
            numbers = range(1, steps + 1)
            with trainer.rollouts_ahead(numbers) as ahead:
                for step in numbers:
                    began = time.perf_counter()
                    metrics, _ = trainer.step(step, ahead)
                    synchronize()
                    found.append({"step": time.perf_counter() - began})
                    found[-1] |= {stage: metrics[f"time/{stage}_s"] for stage in ("rollout", "train", "sync")}
            assert trainer.sync is not None
            trainer.sync.close()
    return {"steps": found, "peak_gb": max(peaks.values()), "peaks_gb": peaks}


def trl_side(folder: str, size: dict[str, Any], steps: int) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    stages = {"rollout": 0.0, "sync": 0.0}
    found: list[dict[str, float]] = []

    def keep(seconds: float) -> None:
        found.append({"step": seconds, **stages, "train": seconds - sum(stages.values())})
        stages.update(rollout=0.0, sync=0.0)

    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [reward(completion) for completion in completions],
        args=settings_of(trl, Path(folder), size, steps),
        train_dataset=Dataset.from_dict({"prompt": [text(size, i) for i in range(256)]}),
        callbacks=[StepTimes(keep)],
    )

    def timed(stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                synchronize()
                stages[stage] += time.perf_counter() - began

        return call

    trainer.vllm_generation.generate = timed("rollout", trainer.vllm_generation.generate)
    trainer.vllm_generation.sync_weights = timed("sync", trainer.vllm_generation.sync_weights)
    trainer.train()
    return {"steps": found, "peak_gb": peak()}


def limit_side(folder: str, size: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from benchmarks.rollout import engine, generate

    requests = size["prompts"] * size["samples"]
    llm = engine(folder, size, bare=True)
    ids = torch.randint(2, size["vocab"], (requests, size["prompt"])).tolist()
    generate(llm, ids, min(64, size["tokens"]), detokenize=False)
    rates = [generate(llm, ids, size["tokens"], detokenize=False)[0] for _ in range(2)]
    llm.llm_engine.engine_core.shutdown()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = torch.randint(2, size["vocab"], (size["micro_batch"], size["prompt"] + size["tokens"]), device=device)

    def pass_() -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(requests // size["micro_batch"]):
            hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        synchronize()
        return time.perf_counter() - began

    pass_()
    steps = [{"rollout": requests * size["tokens"] / rate, "train": pass_(), "sync": 0.0} for rate in rates]
    return {"steps": [{}, *({"step": sum(each.values()), **each} for each in steps)], "peak_gb": peak()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def alone(side: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `side` printed, in a process of its own."""
    steps = options.slow_steps if side in ("trl", "other") else options.steps
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--steps", str(steps)]
    command += ["--small"] if options.small else []
    command += options.settings if side in OF_R3 else []
    before = [options.other] if side == "other" else []
    path = os.pathsep.join([*before, str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        return {"side": side, "failed": done.returncode}
    return {"side": side, **next(json.loads(s) for s in reversed(done.stdout.splitlines()) if s.startswith("{"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="of r3")
    parser.add_argument("--slow-steps", type=int, default=3, help="of the sides that take longer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--sides", nargs="+", default=[side for side in SIDES if side not in ("ahead", "other")], choices=SIDES
    )
    parser.add_argument("--other", help="root of another checkout of r3")
    parser.add_argument("--side", choices=SIDES, help="run this one alone, in this process")
    parser.add_argument("--folder")
    parser.add_argument("settings", nargs="*", help="key=value settings of r3's side")
    options = parser.parse_args()
    size = SMALL if options.small else LARGE
    if options.side:
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            **{
                side: lambda more=more: r3_side(options.folder, size, options.steps, [*options.settings, *more])
                for side, more in OF_R3.items()
            },
            "other": lambda: r3_side(options.folder, size, options.steps, options.settings),
            "trl": lambda: trl_side(options.folder, size, options.steps),
            "limit": lambda: limit_side(options.folder, size),
        }
        print("\n" + json.dumps(ways[options.side]()))
        return
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), size)
        for _ in range(options.rounds):
            for side in options.sides:
                found = alone(side, folder, options)
                print(json.dumps(found), flush=True)
                steps[side] += found.get("steps", [])[1:]
                peaks[side] = found.get("peak_gb", 0.0)
    seconds = {
        side: {stage: round(statistics.median(step[stage] for step in each), 3) for stage in each[0]}
        for side, each in steps.items()
        if each
    }
    reference = seconds.get("r3", {})
    ratios = {
        side: {stage: round(reference[stage] / each[stage], 3) for stage in reference if each.get(stage)}
        for side, each in seconds.items()
        if side != "r3"
    }
    about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps({"machine": about, "seconds": seconds, "peak_gb": peaks, "r3_over": ratios}, indent=1))


if __name__ == "__main__":
    main()
