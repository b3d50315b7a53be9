"""`RolloutRouting` holds checked rows only, and keeps them row for row."""

import pytest
import torch
from models import EXPERTS, LAYERS, random_ids

from r3 import RolloutRouting, RoutingError
from r3.routing import check_rows, compact_dtype


def routing(ids=None, valid=None, **changes) -> RolloutRouting:
    ids = random_ids() if ids is None else ids
    valid = torch.ones(ids.shape[:2], dtype=torch.bool) if valid is None else valid
    return RolloutRouting(**dict(expert_ids=ids, valid=valid, layer_ids=(0, 1, 2), num_experts=EXPERTS) | changes)


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_ids_are_kept_in_the_smallest_dtype_that_holds_them(experts, dtype):
    assert compact_dtype(experts) == dtype
    top = torch.tensor([[[[experts - 1]]]])
    kept = RolloutRouting(top, torch.tensor([[True]]), (0,), experts)
    assert kept.expert_ids.dtype == dtype
    assert torch.equal(kept.expert_ids.long(), top)


@pytest.mark.parametrize("bad", [EXPERTS, -1, 255])
def test_ids_out_of_range_are_refused_with_sample_position_and_layer(bad):
    ids = random_ids().int()
    ids[1, 4, 2, 0] = bad
    with pytest.raises(RoutingError, match=r"1 \(token, layer\).*\n  sample 1, position 4, decoder layer 2"):
        routing(ids)


def test_repeated_ids_are_refused_and_all_of_them_counted():
    ids = random_ids()
    ids[0, :, 1] = 3
    ids[1, 9, 0] = 0
    with pytest.raises(
        RoutingError, match=r"11 \(token, layer\) rows(.|\n)*sample 1, position 9, decoder layer 0: \[0"
    ):
        routing(ids)


def test_the_check_sees_every_block(monkeypatch):
    monkeypatch.setattr("r3.routing.checks._BLOCK_IDS", 3 * LAYERS * 2)
    ids = random_ids(2, 7)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 1] = False
    for b, s in [(0, 0), (0, 6), (1, 0), (1, 6)]:
        broken = ids.clone()
        broken[b, s, 1] = 4
        with pytest.raises(RoutingError, match=f"sample {b}, position {s}, decoder layer 1"):
            check_rows(broken, valid, (0, 1, 2), EXPERTS)
    broken = ids.clone()
    broken[0, 1] = 99
    check_rows(broken, valid, (0, 1, 2), EXPERTS)


def test_what_a_row_that_is_not_valid_holds_does_not_matter_and_is_not_kept():
    ids, valid = random_ids(), torch.ones(2, 10, dtype=torch.bool)
    ids[1, 3] = 77
    valid[1, 3] = False
    assert routing(ids, valid).expert_ids[1, 3].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ids=random_ids().float()), "expert_ids: expected integer"),
        (dict(ids=random_ids()[0]), "expert_ids: expected integer"),
        (dict(valid=torch.ones(2, 9, dtype=torch.bool)), r"valid: expected bool \[B, S\] = \(2, 10\)"),
        (dict(valid=torch.ones(2, 10)), "valid: expected bool"),
        (dict(layer_ids=(0, 1)), "layer_ids: expected 3"),
        (dict(layer_ids=(2, 1, 0)), "ascending"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(changes, message):
    with pytest.raises(RoutingError, match=message):
        routing(**changes)


def test_rows_of_ragged_samples_become_a_right_padded_batch():
    ids = random_ids()
    whole = routing()
    samples = [whole.select(slice(0, 1)).shard(0, 2), whole.select(slice(1, 2))]
    made = RolloutRouting.cat(samples, length=12)
    assert made.shape == (2, 12, LAYERS, 2)
    assert made.valid.sum(1).tolist() == [5, 10]
    assert made.rows_valid == 15
    assert torch.equal(made.expert_ids[0, :5].long(), ids[0, :5])
    assert torch.equal(made.expert_ids[1, :10].long(), ids[1])
    assert not made.expert_ids[0, 5:].any()
    with pytest.raises(RoutingError, match="the longest part, 10, got 8"):
        RolloutRouting.cat(samples, length=8)


def test_select_pad_and_cat_keep_rows_and_versions():
    whole = routing(weight_version=4)
    parts = [whole.select(slice(0, 1)), whole.select([1]).pad(13)]
    joined = RolloutRouting.cat(parts)
    assert joined.shape == (2, 13, LAYERS, 2)
    assert torch.equal(joined.expert_ids[:, :10], whole.expert_ids)
    assert joined.valid.sum(1).tolist() == [10, 10]
    assert joined.weight_version == 4
    assert whole.select(slice(0, 1)).expert_ids.data_ptr() == whole.expert_ids.data_ptr()
    with pytest.raises(RoutingError, match="at least the 13 positions"):
        joined.pad(12)
    with pytest.raises(RoutingError, match="expected one"):
        RolloutRouting.cat([whole, routing(num_experts=EXPERTS + 1)])
