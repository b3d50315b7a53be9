"""Routers that sort tokens by expert: JetMoE's, and Granite's before transformers 5.13.

They return (positions in the flattened `[T, K]`, token of each, weight of each, number of tokens of each expert,
logits). The block has no child `experts`. JetMoE's attention heads are experts too, with a router of the same class and
size; only the MLP's is replayed.
"""

from typing import Any

import torch
from torch import Tensor

from r3.replay.families.family import Family


def _obeys(output: Any, ids: Tensor, num_experts: int) -> bool:
    positions, _, _, expert_size, _ = output
    by_expert = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(expert_size))
    return torch.equal(ids.flatten()[positions], by_expert)


FAMILIES = {
    "JetMoeTopKGating": Family(is_replayed=lambda path: path.endswith(".mlp.router"), reports_ids=_obeys),
    "GraniteMoeTopKGating": Family(reports_ids=_obeys),
    "GraniteMoeHybridTopKGating": Family(reports_ids=_obeys),
    "GraniteMoeSharedTopKGating": Family(reports_ids=_obeys),
}
