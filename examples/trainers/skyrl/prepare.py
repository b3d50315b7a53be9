"""Writes what the recipe needs: problems for SkyRL, and the demo's model with a chat template.

    python examples/trainers/skyrl/prepare.py runs/skyrl

SkyRL makes prompts with the tokenizer's chat template. The demo's model was trained on bare text, so its template
says nothing but the text itself.
"""

import json
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TERMS = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}  # those of `r3 demo`


def write_model(folder: Path) -> None:
    """The demo's model, with a template for its tokenizer."""
    from transformers import AutoTokenizer

    shutil.copytree(EXAMPLES / "chain_sum_moe", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_problems(path: Path, count: int, seed: int) -> None:
    """`count` problems in the form that SkyRL's `PromptDataset` reads."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, **TERMS)
    rows = [
        {
            "data_source": "chain_sum",
            "prompt": [{"role": "user", "content": problem["question"] + "\n"}],
            "env_class": "chain_sum",
            "reward_spec": {"method": "rule", "ground_truth": problem["answer"]},
        }
        for problem in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_problems(folder / "train.jsonl", count=2048, seed=0)
    write_problems(folder / "validation.jsonl", count=128, seed=10**8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
