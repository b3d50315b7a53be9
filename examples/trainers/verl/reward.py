"""verl's `reward.custom_reward_function`: 1 for the right number between <answer> tags."""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    return float(f"<answer>{ground_truth}</answer>" in solution_str)
