"""Counts of magnitudes in fixed bins, from which quantiles follow that are the same however the values were split.

Each octave [2**e, 2**(e + 1)) from `LOWEST` to `HIGHEST` is cut into 16 bins of equal width, which the leading bits of
a float64 tell: no logarithm, whose last bit would move values between a CPU's and a GPU's bins. Zero has a bin of its
own, as have the values below and above.
"""

from __future__ import annotations

import math

import torch

SUB_BITS = 4
PER_OCTAVE = 1 << SUB_BITS
LOWEST = -34
HIGHEST = 14
BINS = 2 + (HIGHEST - LOWEST) * PER_OCTAVE + 1
"""Zero, (0, 2**LOWEST), the bins of the octaves, [2**HIGHEST, inf]."""
RELATIVE_ERROR = 1 / (2 * PER_OCTAVE)
"""A quantile, the middle of its bin, is off by no more than this share of the true one within the octaves."""

_MANTISSA = 52
_EXPONENT_BIAS = 1023
_FIRST = (LOWEST + _EXPONENT_BIAS) << SUB_BITS


def bin_of(values: torch.Tensor) -> torch.Tensor:
    """int64, the bin of each of `values`, float64 from 0 up (infinity included, NaN not) of any shape."""
    leading = (values.contiguous().view(torch.int64) >> (_MANTISSA - SUB_BITS)) - _FIRST
    return (leading.clamp(-1, BINS - 3) + 2).masked_fill(values == 0, 0)


def edges(index: int) -> tuple[float, float]:
    """(lower, upper) of a bin, lower included and upper not, but for the first, which is 0 alone, and for infinity."""
    if index == 0:
        return 0.0, 0.0
    if index == 1:
        return 0.0, math.ldexp(1.0, LOWEST)
    octave, part = divmod(index - 2, PER_OCTAVE)
    if octave == HIGHEST - LOWEST:
        return math.ldexp(1.0, HIGHEST), math.inf
    lower, upper = ((PER_OCTAVE + part + side) / PER_OCTAVE for side in (0, 1))
    return math.ldexp(lower, LOWEST + octave), math.ldexp(upper, LOWEST + octave)


def quantile(counts: torch.Tensor, per_mille: int, largest: float = math.inf) -> float:
    """The value that `per_mille` thousandths of the counted ones do not exceed: the middle of its bin.

    `counts` are integers `[BINS]`. The rank is ceil(per_mille / 1000 * n), as numpy's "inverted_cdf" has it. `largest`,
    where it is known, is never exceeded, and is the answer above 2**HIGHEST. NaN if nothing was counted.
    """
    reached = counts.cumsum(0)
    total = int(reached[-1])
    if not total:
        return math.nan
    rank = max(1, -(-total * per_mille // 1000))
    index = int(torch.searchsorted(reached, rank))
    lower, upper = edges(index)
    return min((lower + upper) / 2, largest)


def pooled(counts: torch.Tensor, per_octave: int, largest: float) -> list[tuple[float, float, int]]:
    """(lower, upper, count) of the bins that are not empty, ascending, `per_octave` of them to an octave.

    `counts` are integers `[BINS]`; `per_octave` is a divisor of 16. The last bin ends at `largest`.
    """
    width = PER_OCTAVE // per_octave
    octaves = counts[2 : BINS - 1].view(-1, width).sum(1).tolist()
    # (first and last of the fine bins, count)
    coarse = [(0, 0, int(counts[0])), (1, 1, int(counts[1]))]
    coarse += [(2 + i * width, 1 + (i + 1) * width, count) for i, count in enumerate(octaves)]
    coarse.append((BINS - 1, BINS - 1, int(counts[-1])))
    found = [(edges(first)[0], edges(last)[1], count) for first, last, count in coarse if count]
    return [(lower, largest if math.isinf(upper) else upper, count) for lower, upper, count in found]


def counts_of(index: torch.Tensor, size: int) -> torch.Tensor:
    """int64 `[size]`, how often each number from 0 below `size` occurs in int32 or int64 `index` of any shape."""
    flat = index.flatten()
    if flat.device.type == "cpu":
        return flat.bincount(minlength=size)
    # A GPU's bincount has the host wait for the largest number.
    return torch.zeros(size, dtype=torch.int64, device=flat.device).index_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int64)
    )
