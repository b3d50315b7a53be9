"""What the routing of a model looks like."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r3.errors import RoutingError


def compact_dtype(num_experts: int) -> torch.dtype:
    """Smallest integer dtype for ids of `num_experts` experts: uint8 up to 256, int16 up to 32768, else int32."""
    if num_experts <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """What the routing of a model looks like.

    Attributes:
        layer_ids: decoder layers that have a router, ascending.
        num_layers: all decoder layers; those in neither `layer_ids` nor `table_layers` are dense.
        num_experts: E.
        top_k: K.
        table_layers: decoder layers that choose by token id (DeepSeek-V4). The engine may report them; replay does not
            need them.

    Example:
        >>> spec = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=64, top_k=8)  # layer 0 is dense
        >>> len(spec.layer_ids)
        2
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    table_layers: tuple[int, ...] = ()

    def columns(self, expert_ids: Tensor) -> Tensor:
        """The columns of `expert_ids` `[B, S, L, K]` that have a router, where L may count all decoder layers.

        Raises:
            RoutingError: L is neither the layers that have a router nor all, or K is not `top_k`.
        """
        layers = len(self.layer_ids)
        columns, slots = expert_ids.shape[2:] if expert_ids.dim() == 4 else (-1, -1)
        if columns not in (layers, self.num_layers) or slots != self.top_k:
            raise RoutingError(
                f"expert_ids: expected [B, S, L, K] with L = {layers} layers that have a router (or all "
                f"{self.num_layers} decoder layers) and K = {self.top_k}, got {tuple(expert_ids.shape)}"
            )
        return expert_ids if columns == layers else expert_ids[:, :, list(self.layer_ids)]


class Parts(NamedTuple):
    """The attributes of a `RolloutRouting`, checked or not yet checked."""

    expert_ids: Tensor
    validity: Tensor
    layer_ids: tuple[int, ...]
    num_experts: int
    weight_version: int | None
