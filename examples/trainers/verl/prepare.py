"""Chain sums as verl reads them, and the demo's model with a chat template, which verl wants of every tokenizer.

python examples/trainers/verl/prepare.py FOLDER
"""

import argparse
import random
from pathlib import Path
from typing import Any

QUESTION = "State the final answer to the following arithmetic problem: {} =\n"
MODEL = Path(__file__).resolve().parents[2] / "chain_sum_moe"
# The model knows no roles.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def problem(number: random.Random) -> dict[str, Any]:
    """One row of the data: three or four numbers of two digits."""
    numbers = [number.randint(10, 99) for _ in range(number.randint(3, 4))]
    signs = [number.choice("+-") for _ in numbers[1:]]
    text = " ".join([str(numbers[0]), *(f"{sign} {term}" for sign, term in zip(signs, numbers[1:], strict=True))])
    answer = numbers[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, numbers[1:], strict=True))
    return {
        "data_source": "chain_sum",
        "prompt": [{"role": "user", "content": QUESTION.format(text)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
        "extra_info": {"problem": text},
    }


def prepare(folder: Path, *, train: int = 4096, test: int = 256) -> None:
    """Write `train.parquet`, `test.parquet` and `model/` into `folder`."""
    import pandas
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("test", test, 2)):
        number = random.Random(seed)
        pandas.DataFrame([problem(number) for _ in range(count)]).to_parquet(folder / f"{name}.parquet")
    AutoModelForCausalLM.from_pretrained(MODEL, dtype="bfloat16").save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)
