"""Time of a GRPO step of TRL with r3's hook and without it, on the same engine settings and model.

    python -m benchmarks.trl_step                      # a GPU: 1.25 billion parameters, 256 rollouts of 1,024 tokens
    python -m benchmarks.trl_step --small              # a CPU: that it runs, not what it takes

Each side is a process of its own, one after the other, and the sides take turns `--rounds` times. The first step, which
starts CUDA graphs and allocators, is left out; of the others the median counts. Sides:

    trl      TRL's own trainer
    replay   r3's trainer, with TRL's own weight sync put back
    r3       r3's trainer
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from benchmarks.machine import machine

SIDES = ("trl", "replay", "r3")
LARGE: dict[str, Any] = dict(
    layers=12, hidden=1024, experts=64, intermediate=384, vocab=151_936, prompt=64, tokens=1024
)
LARGE |= dict(prompts=32, samples=8, micro_batch=16, memory=0.35)
SMALL: dict[str, Any] = dict(layers=2, hidden=64, experts=8, intermediate=32, vocab=512, prompt=8, tokens=8)
SMALL |= dict(prompts=2, samples=2, micro_batch=2, memory=0.1)
TOP_K = 8


def checkpoint(folder: Path, size: dict[str, Any]) -> None:
    """A random Qwen3-MoE and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = Qwen3MoeConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        moe_intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=max(size["hidden"] // 64, 2),
        num_key_value_heads=2,
        head_dim=64,
        num_experts=size["experts"],
        num_experts_per_tok=min(TOP_K, size["experts"] // 2),
        norm_topk_prob=True,
        max_position_embeddings=size["prompt"] + size["tokens"],
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


class StepTimes(TrainerCallback):
    """Seconds of each step; `after` is called with those of a step that has ended."""

    def __init__(self, after: Callable[[float], None] = lambda seconds: None) -> None:
        self.seconds: list[float] = []
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.after(self.seconds[-1])


def settings_of(module: Any, folder: Path, size: dict[str, Any], steps: int) -> Any:
    """The `GRPOConfig` of `module`, TRL or r3's hook."""
    gpu = torch.cuda.is_available()
    return module.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size["micro_batch"],
        gradient_accumulation_steps=size["prompts"] * size["samples"] // size["micro_batch"],
        num_generations=size["samples"],
        max_completion_length=size["tokens"],
        generation_kwargs={"ignore_eos": True},
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16"},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=size["prompt"] + size["tokens"],
        vllm_gpu_memory_utilization=size["memory"],
    )


def run(side: str, folder: Path, size: dict[str, Any], steps: int) -> dict[str, Any]:
    """The seconds of each step of one side, and peak memory in GB."""
    import trl
    from datasets import Dataset

    from trainer_hooks import trl as hooks

    module: Any = trl if side == "trl" else hooks
    gpu = torch.cuda.is_available()
    words = [" ".join(f"w{2 + (i * 31 + j) % (size['vocab'] - 2)}" for j in range(size["prompt"])) for i in range(256)]
    args = settings_of(module, folder, size, steps)
    times = StepTimes()
    trainer = module.GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": words}),
        callbacks=[times],
    )
    if side == "replay":
        del trainer.vllm_generation.sync_weights  # what r3 has put before TRL's own
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    kept = ("sampling/sampling_logp_difference/mean", "routing/replayed_frac", "sync/seconds", "step_time")
    return {
        "seconds": times.seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
        "last": {name: log[-1][name] for name in kept if name in log[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help="run this one alone, in this process")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    size = SMALL if options.small else LARGE
    if options.side:
        print("\n" + json.dumps(run(options.side, options.folder, size, options.steps)))
        return
    seconds: dict[str, list[float]] = {side: [] for side in options.sides}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        checkpoint(Path(made), size)
        for _ in range(options.rounds):
            for side in options.sides:
                alone = ["--side", side, "--folder", made, "--steps", str(options.steps)]
                command = [sys.executable, "-m", "benchmarks.trl_step", *alone, *(["--small"] if options.small else [])]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(json.dumps({"side": side, "failed": done.returncode}), flush=True)
                    continue
                found = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
                results.append({"side": side, **found})
                print(json.dumps(results[-1]), flush=True)
                seconds[side] += found["seconds"][1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    medians = {side: statistics.median(each) for side, each in seconds.items() if each}
    ratios = {side: round(value / medians["trl"], 3) for side, value in medians.items()} if "trl" in medians else {}
    print(json.dumps({"machine": machine(device), "median_s": medians, "ratio_to_trl": ratios}, indent=1))


if __name__ == "__main__":
    main()
