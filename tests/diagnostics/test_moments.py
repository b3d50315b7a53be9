"""Moments of parts merge into those of the whole; of no pairs they are neutral."""

import numpy as np
import pytest
import torch

from r3.diagnostics.moments import Moments


def moments(pairs):
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return Moments.from_list(len(pairs), Moments.of(x, y).tolist())


def test_parts_merge_into_the_whole():
    pairs = np.random.default_rng(0).normal(size=(20, 2)) * [1, 3] + [5, -2]
    whole = moments(pairs[:3]).merge(moments(pairs[3:4])).merge(moments(pairs[4:]))
    assert whole.n == 20
    assert (whole.mean_x, whole.mean_y) == pytest.approx(pairs.mean(0), rel=1e-12)
    assert (whole.std_x, whole.std_y) == pytest.approx(pairs.std(0), rel=1e-12)
    assert whole.pearson == pytest.approx(np.corrcoef(pairs.T)[0, 1], rel=1e-12)


# The square of the second one's means is infinite.
@pytest.mark.parametrize("pairs", [[[1.0, 2.0], [3.0, 7.0]], [[1e200, -1e200]]])
def test_no_pairs_are_neutral(pairs):
    some, none = moments(pairs), Moments()
    assert none.merge(some) == some.merge(none) == some
    assert none.merge(none) == none
