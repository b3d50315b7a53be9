"""The demo's task with TRL's GRPOTrainer and routing replay.

    python examples/trainers/trl/grpo_chain_sum.py
    python examples/trainers/trl/grpo_chain_sum.py --moe_enable_routing_replay false --max_steps 10
    torchrun --nproc-per-node 2 examples/trainers/trl/grpo_chain_sum.py

Arguments are those of `trl.GRPOConfig`. Needs the extras `trl` and `examples`, and a vLLM build.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import TrlParser

from trainer_hooks.trl import GRPOConfig, GRPOTrainer  # in place of: from trl import GRPOConfig, GRPOTrainer

EXAMPLES = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/trl",
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 256,
    "vllm_gpu_memory_utilization": 0.2,
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 64,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 30,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": torch.cuda.is_available(),
    "use_cpu": not torch.cuda.is_available(),
    "model_init_kwargs": {"dtype": "float32"},
}


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    from grpo_demo import CHAIN_SUM, ReasoningGymTask

    parser = TrlParser([GRPOConfig])
    parser.set_defaults(**DEFAULTS)
    (args,) = parser.parse_args_and_config()
    task = ReasoningGymTask("chain_sum", seed=0, settings=CHAIN_SUM)
    problems = task.problems(0, 1024)

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [task.reward(problems[i], text) for i, text in zip(number, completions, strict=True)]

    trainer = GRPOTrainer(
        model=str(EXAMPLES / "chain_sum_moe"),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict(
            {"prompt": [task.prompt(problem) for problem in problems], "number": list(range(len(problems)))}
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
