"""`RolloutRouting` holds checked rows only, and keeps them row for row."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERTS, LAYERS, random_ids

from r3 import RolloutRouting, RoutingError
from r3.routing import RoutingSpec, bad_rows, check_rows, compact_dtype
from r3.routing import checks as module


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


INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("experts", [200, 255, 256, 257, 300, 65536])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bounds_are_those_of_the_number_of_experts_whatever_the_dtype_holds(dtype, experts):
    largest = torch.iinfo(dtype).max
    ids = [
        [0, 1],
        [44, 0],
        [199, 255],
        [largest, 3],
        [5, 5],
        [min(experts, largest), 0],
        [min(experts - 1, largest), 0],
    ]
    expected = [max(row) >= experts or row[0] == row[1] for row in ids]
    made = torch.tensor([[row] for row in ids], dtype=dtype)
    assert bad_rows(made, experts)[:, 0].tolist() == expected
    with pytest.raises(RoutingError, match=rf"^{sum(expected)} \(token, layer\) rows"):
        RolloutRouting(made[None], torch.ones(1, len(ids), dtype=torch.bool), (0,), experts)
    right = made[~torch.tensor(expected)][None]
    kept = RolloutRouting(right, torch.ones(right.shape[:2], dtype=torch.bool), (0,), experts)
    assert torch.equal(kept.expert_ids.long(), right.long())


def test_ids_beyond_64_bits_do_not_come_back_into_range():
    for big in (1 << 32, (1 << 63) + 1, (1 << 64) - 1):
        with pytest.raises(RoutingError, match=r"1 \(token, layer\) rows"):
            RolloutRouting(torch.tensor([[[[big, 3]]]], dtype=torch.uint64), torch.tensor([[True]]), (0,), 8)


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


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_fast_check_of_many_rows_says_what_sets_say(data):
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "int16", "int32", "int64"]))
    slots, experts = data.draw(st.sampled_from([1, 2, 3, 8])), data.draw(st.sampled_from([8, 9, 256, 300]))
    one = st.lists(st.integers(-1, experts), min_size=slots, max_size=slots)
    good = st.permutations(range(min(experts, 12))).map(lambda ids: list(ids)[:slots])
    rows = data.draw(st.lists(st.one_of(good, good, good, one), max_size=6))
    rows = [
        [i & 255 for i in row] if dtype == "uint8" else [abs(i) if dtype[0] == "u" else i for i in row] for row in rows
    ]
    expected = all(len(set(row)) == slots and 0 <= min(row) <= max(row) < experts for row in rows)
    ids = np.array(rows, dtype).reshape(-1, slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CACHED_BYTES", data.draw(st.sampled_from([1, 40, 1 << 18])))
        for many in (False, True):
            assert module.well_formed(ids, experts, many=many) == expected


@pytest.mark.parametrize("distance", range(1, 8))
@pytest.mark.parametrize("many", [False, True])
def test_a_pair_of_equal_ids_is_found_at_any_distance(distance, many):
    for first in range(8 - distance):
        ids = np.arange(8, dtype=np.uint8)[None].repeat(3, 0)
        assert module.well_formed(ids, 8, many=many)
        ids[1, first + distance] = ids[1, first]
        assert not module.well_formed(ids, 8, many=many)
        assert bad_rows(torch.from_numpy(ids)[:, None], 8)[:, 0].tolist() == [False, True, False]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200)), max_size=6), st.integers(1, 90))
def test_blocks_of_rows_are_the_valid_ones_in_order_and_bounded(runs, most):
    valid = torch.tensor([value for value, length in runs for _ in range(length)], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_IDS", most)
        blocks = list(module.row_blocks(valid, 6))
    rows = [torch.arange(len(valid))[block].tolist() for block in blocks]
    assert [row for block in rows for row in block] == valid.nonzero()[:, 0].tolist()
    assert all(1 <= len(block) <= max(1, most // 6) for block in rows)


def test_long_runs_of_rows_are_not_copied_to_be_checked():
    valid = torch.ones(400, dtype=torch.bool)
    valid[100] = False
    assert list(module.row_blocks(valid, 6)) == [slice(0, 100), slice(101, 400)]
    valid[::2] = False
    (short,) = module.row_blocks(valid, 6)
    assert torch.equal(short, torch.arange(1, 400, 2))


def test_each_of_many_bad_rows_is_counted_over_blocks_and_the_first_are_shown(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_IDS", 2 * LAYERS * 2)
    ids, valid = random_ids(), torch.ones(2, 10, dtype=torch.bool)
    ids[:, ::3, 1] = 99
    with pytest.raises(RoutingError, match=r"^8 \(token, layer\) rows") as caught:
        check_rows(ids, valid, (0, 1, 2), EXPERTS)
    shown = [line for line in str(caught.value).splitlines() if "sample" in line]
    places = [f"sample {b}, position {s}, decoder layer 1: [99, 99]" for b in range(2) for s in range(0, 10, 3)]
    assert [line.strip() for line in shown] == places[: len(shown)]
    assert len(shown) >= 3


def test_what_a_row_that_is_not_valid_holds_does_not_matter_and_is_not_kept():
    ids, valid = random_ids(), torch.ones(2, 10, dtype=torch.bool)
    ids[1, 3] = 77
    valid[1, 3] = False
    assert routing(ids, valid).expert_ids[1, 3].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ids=random_ids().float()), "expert_ids: expected integer"),
        (dict(ids=random_ids() * 1j), "expert_ids: expected integer"),
        (dict(ids=random_ids() > 0), "expert_ids: expected integer"),
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
    with pytest.raises(RoutingError, match="where the longest part ends, got 8"):
        RolloutRouting.cat(samples, length=8)


@pytest.mark.parametrize("valid_rows", ["all", "some"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "shared", "expanded", "view"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_what_is_written_to_the_callers_memory_later_does_not_arrive(dtype, kind, valid_rows):
    ids, valid = random_ids().to(dtype), torch.ones(2, 10, dtype=torch.bool)
    valid[0, 3] = valid_rows == "all"
    if kind == "numpy":
        ids, valid = torch.from_numpy(ids.numpy()), torch.from_numpy(valid.numpy())
    elif kind == "shared":
        ids.share_memory_(), valid.share_memory_()
    elif kind == "expanded":
        ids, valid = ids[:1].expand(2, -1, -1, -1), valid[:1].expand(2, -1)
    elif kind == "view":
        ids, valid = ids.transpose(0, 1).contiguous().transpose(0, 1), valid.T.contiguous().T
    expected = ids.long().masked_fill(~valid[..., None, None], 0), valid.clone()
    made = routing(ids, valid)
    ids[0].fill_(7)  # repeated in each row
    valid[0].logical_not_()
    assert torch.equal(made.expert_ids.long(), expected[0])
    assert torch.equal(made.valid, expected[1])
    assert made.rows_valid == int(expected[1].sum())


@pytest.mark.parametrize("write", [lambda r: r.expert_ids.fill_(7), lambda r: r.valid[0].zero_()])
def test_routing_whose_own_memory_was_written_to_is_not_used(write):
    whole = routing()
    uses = (
        lambda r: r.pad(12),
        lambda r: r.to("meta"),
        lambda r: r.to_bytes(),
        lambda r: RolloutRouting.cat([r, routing()]),
        pickle.dumps,
        copy.deepcopy,
    )
    kept = [use(whole) for use in uses]
    part = whole.select(slice(0, 1))
    again = pickle.loads(kept[4]), kept[5], routing(whole.expert_ids, whole.valid)
    write(whole)
    for use in uses:
        for written in (whole, part):
            with pytest.raises(RoutingError, match="written to after it was checked"):
                use(written)
    for unwritten in again:
        assert torch.equal(unwritten.expert_ids.long(), random_ids())
        assert unwritten.rows_valid == 20


def test_routing_can_be_made_and_read_in_inference_mode():
    with torch.inference_mode():
        whole = routing().pad(12)
        assert torch.equal(RolloutRouting.from_bytes(whole.to_bytes()).expert_ids[:, :10].long(), random_ids())
    assert whole.valid.sum() == 20


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


def test_what_is_no_list_of_samples_and_parts_of_two_devices_are_refused():
    whole = routing()
    for samples in ([[0]], torch.zeros(1, 1, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(RoutingError, match="samples: expected a slice or indices"):
            whole.select(samples)
    with pytest.raises(RoutingError, match="expected one"):
        RolloutRouting.cat([whole, whole.to("meta")])


def test_joined_and_thinned_routing_keeps_dtype_and_version():
    whole = routing(weight_version=4)
    assert RolloutRouting.cat([whole, whole]).expert_ids.dtype == whole.expert_ids.dtype
    some = whole.layers(whole.layer_ids[1:])
    assert (some.weight_version, some.layer_ids) == (4, whole.layer_ids[1:])
    assert torch.equal(some.expert_ids, whole.expert_ids[:, :, 1:])
    for wrong in (whole.layer_ids[::-1], (*whole.layer_ids, 99), whole.layer_ids[:1] * 2):
        with pytest.raises(RoutingError):
            whole.layers(wrong)


def test_valid_rows_are_counted_once(monkeypatch):
    """Where routing is on a GPU, the host would wait for each count."""
    whole = routing(valid=torch.arange(20).view(2, 10) % 3 > 0)
    monkeypatch.setattr("r3.routing.types.counted", None)
    some = whole.layers(whole.layer_ids[1:])
    assert (some.rows_valid, some.pairs_valid) == (13, 26)
    for same in (whole, whole.to("cpu"), whole.pad(12), pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert (same.rows_valid, same.pairs_valid) == (13, 39)


def test_a_rollout_that_was_not_captured_has_routing_without_rows():
    spec = RoutingSpec(layer_ids=(1, 3), num_layers=4, num_experts=300, top_k=4)
    none = RolloutRouting.without_rows(spec, 7)
    assert none.shape == (1, 7, 2, 4)
    assert (none.layer_ids, none.num_experts, none.weight_version) == ((1, 3), 300, None)
    assert none.expert_ids.dtype == torch.int16
    assert not none.expert_ids.any()
    assert none.validity.dtype == torch.bool
    assert none.validity.shape == (1, 7)
    assert not none.validity.any()
    assert (none.rows_valid, none.pairs_valid) == (0, 0)
    other = RolloutRouting(torch.arange(8).view(1, 1, 2, 4), torch.tensor([[True]]), (1, 3), 300)
    assert RolloutRouting.cat([none, other]).valid.sum(1).tolist() == [0, 1]


def test_routing_shows_how_much_of_it_is_valid():
    whole = routing(weight_version=4)
    shown = "RolloutRouting((2, 10, 3, 2) of 8 experts, {} of 20 rows valid{}, torch.uint8 on cpu, version 4)"
    assert repr(whole) == shown.format(20, "")
    by_layer = torch.ones(2, 10, LAYERS, dtype=torch.bool)
    by_layer[0, 0, 0] = by_layer[1, 4] = False
    partial = routing(valid=by_layer, weight_version=4)
    assert repr(partial) == shown.format(18, " and 2 (token, layer) pairs of others")
