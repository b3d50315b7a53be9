"""Pairs of token and slot in the order of their experts, as grouped products take them."""

from typing import NamedTuple

import torch
from torch import Tensor

_INT16 = 1 << 15


class Order(NamedTuple):
    """Where each pair's row is among rows sorted by expert.

    Attributes:
        places: int32 `[T, K]`, the row of each pair.
        slots: int64 `[S]`, the pair, counted over `[T, K]`, of each row: the inverse of `places`.
        ends: int32 `[E]`, one past the last row of each expert. Rows from `ends[-1]` on have no expert.
    """

    places: Tensor
    slots: Tensor
    ends: Tensor


def order_by_expert(ids: Tensor, num_experts: int) -> Order:
    """`Order` of integer expert ids `[T, K]`; without a wait for the device.

    An expert's rows are in the order of the tokens, so that sums over them are the same in every run. Ids from
    `num_experts` on, with which expert parallelism marks experts of other ranks, come last.
    """
    flat = ids.reshape(-1)
    # A radix sort passes over each byte of its keys: two of them are a quarter of the passes of int64.
    keys = flat.to(torch.int16) if num_experts < _INT16 else flat
    experts, slots = keys.sort(stable=True)
    places = torch.empty(len(flat), dtype=torch.int32, device=ids.device)
    places[slots] = torch.arange(len(flat), dtype=torch.int32, device=ids.device)
    every = torch.arange(num_experts, dtype=keys.dtype, device=ids.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    return Order(places.view(ids.shape), slots, ends)
