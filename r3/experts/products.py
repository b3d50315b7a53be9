"""Products of sorted rows with the weights of their experts: torch's grouped kernel, or a loop over the experts."""

from collections.abc import Iterator

import torch
from torch import Tensor


def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`[S, A]` x `[E, A, B]` -> `[S, B]`: each expert's rows with its matrix. Rows of no expert are left as they are.

    `weights` may be a transposed view. `ends` is int32 `[E]`, see `Order`.
    """
    if _has_kernel(rows):
        return _kernel(rows, weights, ends)
    out = rows.new_empty(len(rows), weights.shape[2])
    for expert, part in _parts(ends):
        torch.mm(rows[part], weights[expert], out=out[part])
    return out


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`[S, A]`, `[S, B]` -> `[E, A, B]`: of each expert the sum over its rows, in order, of outer products; else 0."""
    if _has_kernel(left):
        return _kernel(left.t(), right, ends)
    out = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for expert, part in _parts(ends):
        torch.mm(left[part].t(), right[part], out=out[expert])
    return out


def _has_kernel(rows: Tensor) -> bool:
    # In other dtypes, and on a CPU, torch loops over the experts itself.
    return rows.is_cuda and rows.dtype == torch.bfloat16


def _kernel(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    public = getattr(torch.nn.functional, "grouped_mm", None)  # from torch 2.10 on
    return (public or torch._grouped_mm)(left, right, offs=ends)  # pyrefly: ignore


def _parts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
