"""What may differ from one router family to the next."""

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
    """How one router class is found and proved.

    Attributes:
        refused: why ids alone do not determine what these routers do; empty if they do.
        by_token: the choice is a function of the token id, the same on both sides: there is nothing to replay.
        is_site: whether the router at a path is to be replayed.
        obeys: whether an output of the router says that `ids` `[T, K]` were used, given (output, ids, E).
        weightless: experts, counted from the end, whose weight is zero by definition.
    """

    refused: str = ""
    by_token: bool = False
    is_site: Callable[[str], bool] = lambda path: True
    obeys: Callable[[Any, Tensor, int], bool] = _returns_ids
    weightless: int = 0


DEFAULT = Family()
