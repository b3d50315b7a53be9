"""GRPO on a small MoE that does chain sums, with rollout routing replay. This is what `r3 demo` runs.

    python examples/grpo_demo.py
    python examples/grpo_demo.py trainer.policy.fsdp_config.moe_enable_routing_replay=false trainer.max_steps=20
    python examples/grpo_demo.py trainer.policy.model.path=/my/model task.name=spell_backward
    torchrun --nproc-per-node 4 examples/grpo_demo.py trainer.policy.sequence_parallel_size=2

Settings are `key=value`; `--settings` lists those of the run that the other arguments ask for, and starts none.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

LIST = "--settings"
DEFAULTS = {
    "trainer.policy.model.path": str(Path(__file__).parent / "chain_sum_moe"),
    "trainer.policy.optimizer_config.lr": 1e-4,
    "trainer.policy.fsdp_config.gradient_checkpointing": False,  # a small model has memory to spare
    "trainer.updates_per_step": 4,
    # Several chunks a sync, as with models that do not fit into one.
    "generator.inference_engine.weight_sync.chunk_mib": 1,
    "task.name": "chain_sum",
}
CHAIN_SUM = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}


class ReasoningGymTask:
    """Problems of a reasoning-gym data set; the answer is what stands between <answer> tags, judged by the data set."""

    def __init__(self, name: str, seed: int, settings: dict[str, Any]) -> None:
        import reasoning_gym

        # Problem i is made from seed + i: the size only bounds the index, and seeds must not overlap.
        self._data = reasoning_gym.create_dataset(name, seed=seed * 10**8, size=10**8, **settings)

    def problems(self, step: int, count: int) -> list[dict[str, Any]]:
        return [self._data[step * count + i] for i in range(count)]

    def eval_problems(self, count: int) -> list[dict[str, Any]]:
        # From the other end, which training does not come to.
        return [self._data[len(self._data) - 1 - i] for i in range(count)]

    def prompt(self, problem: dict[str, Any]) -> str:
        return problem["question"] + "\n"

    def reward(self, problem: dict[str, Any], completion: str) -> float:
        from reasoning_gym.utils import extract_answer

        return self._data.score_answer(extract_answer(completion), problem)


def demo_config(arguments: list[str], defaults: dict[str, Any]) -> Any:
    """The settings of `arguments` on top of `defaults`; without a task of their own, of the demo's."""
    from r3 import R3Config

    overrides = [pair for pair in arguments if pair != LIST]
    own_task = any(pair.startswith("task.name=") for pair in overrides)
    task_defaults = {} if own_task else {f"task.settings.{name}": value for name, value in CHAIN_SUM.items()}
    return R3Config.from_overrides(overrides, defaults | task_defaults)


def demo_task(config: Any) -> ReasoningGymTask:
    return ReasoningGymTask(config.task.name, config.trainer.seed, config.task.settings)


def show_log() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("r3").setLevel(logging.INFO)
    # vLLM's processes log hundreds of lines; what fails is raised here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def say(folder: Path) -> None:
    """What the run in `folder` has learned, and where its report is."""
    from r3.diagnostics import read_metrics

    steps = read_metrics(folder)
    first, last = steps[: len(steps) // 3 or 1], steps[-(len(steps) // 3 or 1) :]
    print(f"reward       {mean(first, 'reward/mean'):.3f} -> {mean(last, 'reward/mean'):.3f} (first and last third)")
    if "logprob_diff/replayed/k3" in steps[0]:
        live, replayed = (mean(steps, f"logprob_diff/{mode}/k3") for mode in ("live", "replayed"))
        lower = f"{live / replayed:.1f} times lower" if replayed else "the engine's, bit for bit"
        print(f"k3 KL, nats  {live:.2e} live, {replayed:.2e} replayed: {lower}")
    print(f"report       {folder / 'report.html'}")


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def main(arguments: list[str]) -> None:
    from r3.config import process_rank, settings_lines

    config = demo_config(arguments, DEFAULTS)
    if LIST in arguments:
        print(*settings_lines(config), sep="\n")
        return
    show_log()

    from trainer_hooks.launch import train

    folder = train(config, demo_task(config))
    if process_rank()[0] == 0:
        say(folder)


if __name__ == "__main__":
    from r3 import R3Error

    try:
        main(sys.argv[1:])
    except R3Error as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
