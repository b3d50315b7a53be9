"""Which rows are valid: bool `[B, S]`, or `[B, S, L]` where some are valid in some of the L layers only.

Nearly all routing is of the first form, which is L times smaller.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """Rows that are valid in every layer, and (token, layer) pairs that are valid."""

    rows: int
    pairs: int


def counted(validity: Tensor, layers: int) -> Counts:
    """How much of either form is valid. Waits for the device, once."""
    if validity.dim() == 2:
        rows = int(validity.sum())
        return Counts(rows, rows * layers)
    return Counts(*torch.stack([validity.all(-1).sum(), validity.sum()]).tolist())


def by_pair(validity: Tensor) -> Tensor:
    """bool `[B, S, L]`, or `[B, S, 1]` where it is the same for all layers."""
    return validity if validity.dim() == 3 else validity[..., None]


def by_row(validity: Tensor) -> Tensor:
    """The form `[B, S]` where all layers agree. Waits for the device."""
    if validity.dim() == 2:
        return validity
    rows = validity.all(-1)
    return rows if torch.equal(validity, rows[..., None].expand_as(validity)) else validity


def in_one_form(validities: Sequence[Tensor]) -> list[Tensor]:
    """All `[B, S]`, or all `[B, S, L]` if one of them is."""
    layers = next((validity.shape[2] for validity in validities if validity.dim() == 3), None)
    if layers is None:
        return list(validities)
    return [by_pair(validity).expand(-1, -1, layers) for validity in validities]
