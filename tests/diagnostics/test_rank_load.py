"""The load of ranks that share the experts, by hand."""

import math

import pytest
import torch

from r3 import DiagnosticsError
from r3.diagnostics import LoadSums, rank_load_metrics
from r3.diagnostics.metric import without_layer
from r3.diagnostics.rank_load import RANK_LOAD_METRICS


def test_the_largest_over_the_mean_of_the_ranks_by_layer():
    # Four rows, two layers, two slots, eight experts on four ranks: 0 and 1 are the first one's.
    even = torch.tensor([[[0, 2], [0, 1]], [[4, 6], [0, 1]], [[1, 3], [0, 2]], [[5, 7], [6, 7]]])
    one = torch.zeros_like(even)
    one[..., 1] = 1
    valid = torch.tensor([True, True, True, True])
    load = LoadSums.from_tensors(even, one, valid, num_experts=8, layer_ids=[3, 117])
    found = rank_load_metrics(load, 4)
    assert found == {
        "rank_load_max/live": 2.5,
        "rank_load_max/rollout": 4.0,
        "rank_load/live/layer_03": 1.0,
        "rank_load/live/layer_117": 2.5,  # 5, 1, 0 and 2 slots
        "rank_load/rollout/layer_03": 4.0,
        "rank_load/rollout/layer_117": 4.0,
    }
    assert {without_layer(name) for name in found} == {name for metric in RANK_LOAD_METRICS for name in metric.names}
    assert set(rank_load_metrics(load, 1).values()) == {1.0}
    with pytest.raises(DiagnosticsError, match="expected a divisor of 8 experts, got 3"):
        rank_load_metrics(load, 3)


def test_without_rows_it_is_nan():
    assert all(map(math.isnan, rank_load_metrics(LoadSums.empty(num_experts=4, layer_ids=[0]), 2).values()))
