"""Checks on the content of routing: expert ids in range, and distinct within a row.

Nearly all routing is valid, so on the CPU a fast check comes first, and only if it fails are the bad rows searched.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r3.errors import SHOWN, RoutingError, summary

_BLOCK_IDS = 1 << 24  # ids looked at in one go: bounds the extra memory
_CACHED_BYTES = 1 << 18  # ids whose columns, and results of comparing them, stay in a core's cache
MANY_IDS = 1 << 18  # from this size a compiled check pays for its compilation
_LONG = (torch.int64, torch.uint32, torch.uint64)
_RUN_ROWS = 64  # mean length of runs of valid rows from which slices are faster than a gather


def bad_rows(ids: Tensor, num_experts: int) -> Tensor:
    """`[R, L]` bool: rows of integer `[R, L, K]` with an id outside [0, num_experts) or an id that occurs twice."""
    # torch orders no unsigned dtype but uint8. An id above the largest int64 becomes negative, and bad all the same.
    wide = ids if ids.dtype == torch.uint8 else ids.to(torch.int64 if ids.dtype in _LONG else torch.int32)
    # torch compares with the bound as the ids' dtype holds it: with 0 for 256 and uint8.
    bad = (wide.amax(-1).long() >= num_experts) | (wide.amin(-1) < 0)
    if ids.shape[-1] > 1:
        ordered = wide.sort(dim=-1).values
        bad |= (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    return bad


def well_formed(rows: np.ndarray, num_experts: int, *, many: bool) -> bool:
    """Whether each row of integer `[R, K]`, in C order, holds K distinct ids in [0, num_experts).

    With `many` the check is compiled where that can be done: for 8 ids of one byte, where numba is installed. That
    takes a second once, and gives the same answer.
    """
    slots = rows.shape[1]
    if not rows.size:
        return True
    repeated = _compiled_repeated_bytes() if many and slots == 8 and rows.itemsize == 1 else None
    if repeated is not None:
        return _in_range(rows, num_experts) and not repeated(rows.view(np.uint64).reshape(-1))
    step = max(1, _CACHED_BYTES // (slots * rows.itemsize))
    return all(
        _in_range(rows[at : at + step], num_experts) and not _repeated(rows[at : at + step])
        for at in range(0, len(rows), step)
    )


def _in_range(rows: np.ndarray, num_experts: int) -> bool:
    limits = np.iinfo(rows.dtype)
    return (limits.min == 0 or int(rows.min()) >= 0) and (limits.max < num_experts or int(rows.max()) < num_experts)


def _repeated(rows: np.ndarray) -> bool:
    """Whether any row holds an id twice: each column is compared with those to its right."""
    columns = rows.T.copy()
    equal = columns[1:] == columns[:-1]
    same = np.empty_like(equal)
    for distance in range(2, len(columns)):
        pairs = len(columns) - distance
        np.equal(columns[distance:], columns[:pairs], out=same[:pairs])
        np.logical_or(equal[:pairs], same[:pairs], out=equal[:pairs])
    return bool(equal.any())


@cache
def _compiled_repeated_bytes() -> Callable[[np.ndarray], bool] | None:
    """Whether any 64-bit word holds a byte twice; None without numba. Five times as fast as `_repeated`."""
    try:
        import numba
    except ImportError:  # also raised for a numpy that is too new for it
        return None
    ones, highs = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    one, two, three, four = (np.uint64(8 * lanes) for lanes in (1, 2, 3, 4))
    seven, six, five = (np.uint64(8 * lanes) for lanes in (7, 6, 5))

    @numba.njit(nogil=True)
    def repeated(words: np.ndarray) -> bool:
        # A byte of word ^ (word rotated by r bytes) is 0 where two ids are equal; r = 1 to 4 meet all pairs.
        zero_bytes = np.uint64(0)
        for word in words:
            a = word ^ ((word >> one) | (word << seven))
            b = word ^ ((word >> two) | (word << six))
            c = word ^ ((word >> three) | (word << five))
            d = word ^ ((word >> four) | (word << four))
            # The high bit of a byte of (x - 1) & ~x says that a byte of x is 0, there or below.
            zero_bytes |= ((a - ones) & ~a) | ((b - ones) & ~b) | ((c - ones) & ~c) | ((d - ones) & ~d)
        return (zero_bytes & highs) != 0

    return repeated


def check_rows(
    expert_ids: Tensor,
    valid: Tensor,
    layer_ids: tuple[int, ...],
    num_experts: int,
    error: type[Exception] = RoutingError,
) -> None:
    """Raise unless every valid row holds K distinct ids in [0, num_experts).

    Args:
        expert_ids: integer `[B, S, L, K]`.
        valid: bool `[B, S]` or `[B, S, L]`; what is not valid is not looked at.
        layer_ids: decoder layer of each of the L columns, for the message.
        num_experts: E.
        error: class to raise.

    Raises:
        error: names sample, position and decoder layer of the first offending rows.
    """
    if not expert_ids.numel():
        return
    # The unit of validity: a token, or a (token, layer) pair.
    length, layers, slots = expert_ids.shape[1:]
    columns = layers if valid.dim() == 2 else 1
    rows = expert_ids.reshape(-1, columns, slots)
    many = rows.numel() >= MANY_IDS
    bad_places: list[tuple[int, int]] = []
    total = 0
    for index in row_blocks(valid.reshape(-1), columns * slots):
        block = rows[index]
        if block.device.type == "cpu":
            ids = block.reshape(-1, block.shape[-1]).numpy()
            if well_formed(ids, num_experts, many=many):
                continue
        hits = bad_rows(block, num_experts).nonzero()
        total += len(hits)
        for r, column in hits[: SHOWN - len(bad_places)].tolist():
            bad_places.append((index.start + r if isinstance(index, slice) else int(index[r]), column))
    if not total:
        return
    lines = []
    for row, column in bad_places:
        token, layer = divmod(row * columns + column, layers)
        lines.append(
            f"sample {token // length}, position {token % length}, decoder layer {layer_ids[layer]}: "
            f"{rows[row, column].tolist()}"
        )
    raise error(
        f"{total} (token, layer) rows of routing are not {slots} distinct expert ids in "
        f"[0, {num_experts}). Rows that were not captured must be marked invalid, never filled. Found:{summary(lines)}"
    )


def require_same_rows(expected: tuple[int, ...], parts: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise unless each of `parts` that is not None has the rows of the others: nothing of one may come to another.

    Args:
        expected: [B, S].
        parts: tensors of that shape, and routing or tensors that have more dimensions after it.
        error: class to raise.
    """
    wrong = [
        f"{name}: {list(part.shape)}"
        for name, part in parts.items()
        if part is not None and (len(expected) != 2 or tuple(part.shape[:2]) != expected)
    ]
    if wrong:
        raise error(f"expected [B, S] = {list(expected)} of all parts, got{summary(wrong)}")


def row_blocks(valid: Tensor, row_ids: int) -> Iterator[slice | Tensor]:
    """Indices of all rows that are valid, in order, for at most `_BLOCK_IDS` ids each: slices where runs are long."""
    step = max(1, _BLOCK_IDS // row_ids)
    where = valid.nonzero().squeeze(-1)
    if not len(where):
        return
    ends = (where[1:] != where[:-1] + 1).nonzero().squeeze(-1) + 1
    if valid.device.type == "cpu" and len(where) >= _RUN_ROWS * len(ends):
        for run in where.tensor_split(ends):
            first, stop = int(run[0]), int(run[-1]) + 1
            yield from (slice(at, min(at + step, stop)) for at in range(first, stop, step))
    else:
        yield from where.split(step)
