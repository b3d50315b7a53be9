"""The bins: every value is in its own, and quantiles are those of numpy up to half a bin."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.diagnostics.histogram import BINS, HIGHEST, LOWEST, RELATIVE_ERROR, bin_of, counts_of, edges, pooled, quantile

light = settings(deadline=None, max_examples=100)
value = st.one_of(st.floats(0, 2.0**HIGHEST), st.floats(0), st.sampled_from([-0.0, 5e-324, 1e300, math.inf]))


def binned(values):
    return counts_of(bin_of(torch.tensor(values, dtype=torch.float64)), BINS)


@light
@given(value)
def test_a_value_lies_within_the_edges_of_its_bin(x):
    index = int(bin_of(torch.tensor(x, dtype=torch.float64)))
    lower, upper = edges(index)
    assert (x == 0) == (index == 0)
    assert lower <= x
    assert x < upper or index in (0, BINS - 1)


def test_edges_follow_each_other_without_a_gap():
    found = [edges(index) for index in range(BINS)]
    assert all(a[1] == b[0] for a, b in pairwise(found[1:]))
    assert found[0] == (0, 0)
    assert found[1] == (0, 2.0**LOWEST)
    assert found[-1] == (2.0**HIGHEST, math.inf)
    assert all((upper - lower) / 2 <= RELATIVE_ERROR * lower for lower, upper in found[2:-1])
    for index, (lower, upper) in enumerate(found[1:-1], 1):
        assert bin_of(torch.tensor([math.nextafter(upper, 0), upper], dtype=torch.float64)).tolist() == [
            index,
            index + 1,
        ]
        assert lower < upper


@light
@given(st.lists(st.floats(0, 2.0**HIGHEST, exclude_max=True), min_size=1, max_size=50), st.integers(0, 1000))
def test_a_quantile_is_that_of_numpy_up_to_half_a_bin(values, per_mille):
    exact = sorted(values)[max(0, -(-len(values) * per_mille // 1000) - 1)]
    if per_mille % 100 == 0 and per_mille:
        assert exact == np.quantile(values, per_mille / 1000, method="inverted_cdf")
    got = quantile(binned(values), per_mille, max(values))
    assert got == pytest.approx(exact, rel=RELATIVE_ERROR, abs=2.0**LOWEST)
    assert got <= max(values)


def test_the_quantile_of_nothing_is_nan():
    assert math.isnan(quantile(torch.zeros(BINS, dtype=torch.int64), 500))


@pytest.mark.parametrize("per_octave", [1, 2, 4, 8, 16])
def test_pooled_bins_keep_all_counts(per_octave):
    values = [0.0, 1e-30, *(2.0**e * f for e in range(-10, 5) for f in (1.0, 1.3, 1.99)), 1e9]
    rows = pooled(binned(values), per_octave, 1e9)
    assert rows[0] == (0, 0, 1)
    for lower, upper, count in rows[1:]:
        assert count == sum(lower <= x < upper or x == upper == 1e9 for x in values[1:])
    assert sum(count for *_, count in rows) == len(values)
    assert len([row for row in rows if 1 <= row[0] < 2]) == min(per_octave, 3)


@pytest.mark.gpu
def test_a_gpu_has_the_bins_of_a_cpu():
    values = torch.rand(100_000, dtype=torch.float64).pow(12) * 2.0 ** (HIGHEST + 1)
    assert torch.equal(bin_of(values.cuda()).cpu(), bin_of(values))
    assert torch.equal(counts_of(bin_of(values.cuda()), BINS).cpu(), counts_of(bin_of(values), BINS))
