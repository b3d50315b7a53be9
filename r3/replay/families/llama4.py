"""Llama 4: the router returns scores `[T, E]`, a sigmoid of the chosen logits and zero elsewhere, and no ids."""

from typing import Any

import torch
from torch import Tensor

from r3.replay.families.family import Family


def _obeys(output: Any, ids: Tensor, num_experts: int) -> bool:
    scores = output[0]
    return torch.equal(scores != 0, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True))


FAMILIES = {"Llama4Router": Family(reports_ids=_obeys)}
