"""What may differ between router families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _returns_ids(output: Any, ids: Tensor, num_experts: int) -> bool:
    """Whether one of a router's outputs is `ids`."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return any(
        isinstance(t, Tensor) and not t.is_floating_point() and t.shape == ids.shape and torch.equal(t, ids)
        for t in outputs
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one router class is found, replayed and proved.

    Attributes:
        unsupported_reason: why ids alone do not determine what these routers do; empty if they do.
        hash_routed: the choice is a function of the token id, the same on both sides: there is nothing to replay.
        is_replayed: whether the router at a path is to be replayed.
        reports_ids: whether an output of the router says that `ids` `[T, K]` were used, given (output, ids, E).
        num_null_experts: experts, counted from the end, whose weight is zero by definition.
    """

    unsupported_reason: str = ""
    hash_routed: bool = False
    is_replayed: Callable[[str], bool] = lambda path: True
    reports_ids: Callable[[Any, Tensor, int], bool] = _returns_ids
    num_null_experts: int = 0


DEFAULT = Family()
