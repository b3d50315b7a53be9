"""Writes problems for run.sh: python problems.py problems.jsonl 512"""

import json
import sys
from pathlib import Path

import reasoning_gym


def main(path: str, count: str) -> None:
    data = reasoning_gym.create_dataset(
        "chain_sum", seed=0, size=int(count), min_terms=3, max_terms=4, min_digits=2, max_digits=2
    )
    rows = [
        {"messages": [{"role": "user", "content": each["question"] + "\n"}], "answer": each["answer"]} for each in data
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
