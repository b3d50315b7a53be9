"""Routing of a micro-batch in the layout in which verl's FSDP engine calls its model, and back.

Shapes: B samples, T tokens of all of them, S positions of a padded row, L layers, K slots.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from r3.errors import RoutingError
from r3.routing import RolloutRouting, RoutingSpec, routing_of

Jagged: TypeAlias = Any  # a nested tensor of layout torch.jagged: torch declares no such methods


def packed_routing(spec: RoutingSpec, rows: Jagged, input_ids: Jagged, pad_size: int) -> RolloutRouting:
    """`[1, T + pad_size, L, K]` of jagged `rows` [B, ., L, K], for the tokens of jagged `input_ids` in one row."""
    values = _values(rows, input_ids)
    padding = values.new_zeros((pad_size, *values.shape[1:]))
    return routing_of(spec, torch.cat([values, padding]), repeats_are_missing=True)


def padded_routing(spec: RoutingSpec, rows: Jagged, input_ids: Jagged) -> RolloutRouting:
    """`[B, S, L, K]` of jagged `rows`, right-padded to the longest sample."""
    values, tokens = _values(rows, input_ids), token_mask(input_ids)
    padded = values.new_zeros((*tokens.shape, *values.shape[1:]))
    padded[tokens] = values
    return routing_of(spec, padded, repeats_are_missing=True)


def token_mask(input_ids: Jagged) -> Tensor:
    """bool `[B, S]`: True on the tokens of jagged `input_ids`, right-padded."""
    lengths = input_ids.offsets().diff()
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def _values(rows: Jagged, input_ids: Jagged) -> Tensor:
    if not rows.is_nested or not torch.equal(rows.offsets(), input_ids.offsets()):
        got = rows.offsets().diff().tolist() if rows.is_nested else f"a tensor {tuple(rows.shape)}"
        raise RoutingError(
            f"routed_experts: expected a row of each token, jagged like input_ids of "
            f"{input_ids.offsets().diff().tolist()} tokens, got {got}"
        )
    return rows.values()
