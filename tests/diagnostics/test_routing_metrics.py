"""Routing metrics against Python sets and exact fractions, over splits, blocks, dtypes and hostile input."""

import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.diagnostics import RoutingSums, compare_routing
from r3.diagnostics import routing_pair as module
from r3.errors import DiagnosticsError

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]
light = settings(deadline=None, max_examples=60)


def reference(live, replayed, valid, layers):
    """Sets and fractions, one token and layer at a time."""
    reordered = sum(
        a != b and set(a) == set(b)
        for token_a, token_b, ok in zip(live, replayed, valid, strict=True)
        for a, b in zip(token_a, token_b, strict=True)
        if ok
    )
    pairs = [
        [(set(a), set(b)) for a, b in zip(token_a, token_b, strict=True)]
        for token_a, token_b, ok in zip(live, replayed, valid, strict=True)
        if ok
    ]
    n, cells = len(pairs), len(pairs) * len(layers)

    def share(part, whole):
        return float(Fraction(part, whole)) if whole else math.nan

    overlap = sum((Fraction(len(a & b), len(a | b)) for token in pairs for a, b in token), Fraction(0))
    return {
        "rows": float(n),
        "differing_rows": share(sum(a != b for token in pairs for a, b in token), cells),
        "differing_tokens": share(sum(any(a != b for a, b in token) for token in pairs), n),
        "jaccard": float(overlap / cells) if cells else math.nan,
        "order_differs": share(reordered, cells),
    } | {
        f"differing_rows/layer_{i:02d}": share(sum(t[j][0] != t[j][1] for t in pairs), n) for j, i in enumerate(layers)
    }


@st.composite
def routings(draw):
    n_layers, slots = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts = draw(st.sampled_from([slots, slots + 1, 12, 256]))
    row = (
        st.permutations(range(experts)) if experts <= 12 else st.lists(st.integers(0, 255), min_size=slots, unique=True)
    )
    row = row.map(lambda ids: list(ids)[:slots])
    token = st.lists(row, min_size=n_layers, max_size=n_layers)
    rows = draw(st.lists(st.tuples(token, token, st.booleans()), min_size=1, max_size=12))
    return [list(part) for part in zip(*rows, strict=True)]


def tensors(live, replayed, valid, dtypes=(torch.uint8, torch.int64)):
    return torch.tensor(live, dtype=dtypes[0]), torch.tensor(replayed, dtype=dtypes[1]), torch.tensor(valid)


def random_ids(*shape, experts=64, seed=0):
    scores = torch.rand(*shape[:-1], experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(shape[-1]).indices


@light
@given(routings(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_matches_sets_and_fractions(case, first, second):
    got = compare_routing(*tensors(*case, dtypes=(first, second)))
    expected = reference(*case, layers=range(len(case[0][0])))
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, rel=1e-15, nan_ok=True)


def test_order_of_slots_does_not_matter():
    ids = random_ids(2, 5, 3, 8)
    shuffled = ids.gather(-1, torch.rand(ids.shape).argsort(-1))
    got = compare_routing(ids, shuffled, torch.ones(2, 5, dtype=torch.bool))
    assert not torch.equal(ids, shuffled)
    assert (got["differing_rows"], got["differing_tokens"], got["jaccard"]) == (0, 0, 1)
    assert got["order_differs"] == (ids != shuffled).any(-1).double().mean()


def test_one_swapped_expert_counts_once():
    live = random_ids(1, 4, 3, 8)
    replayed = live.clone()
    replayed[0, 2, 1, 5] = next(e for e in range(64) if e not in live[0, 2, 1].tolist())
    got = compare_routing(live, replayed, torch.ones(1, 4, dtype=torch.bool), layer_ids=[3, 10, 100])
    assert got == pytest.approx(
        {
            "rows": 4,
            "differing_rows": 1 / 12,
            "differing_tokens": 1 / 4,
            "jaccard": (11 + 7 / 9) / 12,
            "order_differs": 0,
            "differing_rows/layer_03": 0,
            "differing_rows/layer_10": 1 / 4,
            "differing_rows/layer_100": 0,
        }
    )


def test_an_impossible_choice_and_another_order_in_any_block_count(monkeypatch):
    """Blocks are taken one after the other: no later one may undo what an earlier one found, or stand for it."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2 * 3 * 8)
    ids, valid = random_ids(1, 9, 3, 8), torch.ones(1, 9, dtype=torch.bool)
    for position in (0, 4, 8):
        repeated = ids.clone()
        repeated[0, position, 1, 5] = repeated[0, position, 1, 4]
        with pytest.raises(DiagnosticsError):
            compare_routing(ids, repeated, valid)
        shuffled = ids.clone()
        shuffled[0, position, 1] = ids[0, position, 1].flip(-1)
        assert compare_routing(ids, shuffled, valid)["order_differs"] == 1 / 27
        assert compare_routing(ids, shuffled, valid & (torch.arange(9) != position))["order_differs"] == 0


@pytest.mark.parametrize("filler", [-1, 0, 63])
def test_invalid_rows_never_count(filler):
    live, replayed = random_ids(3, 7, 4, 8, seed=1), random_ids(3, 7, 4, 8, seed=2)
    valid = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    expected = compare_routing(live[valid], replayed[valid], torch.ones(int(valid.sum()), dtype=torch.bool))
    replayed[~valid] = filler
    assert compare_routing(live, replayed, valid) == expected


@light
@given(routings(), st.data())
def test_merged_over_any_split_equals_at_once(case, data):
    live, replayed, valid = tensors(*case)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(valid)), max_size=4)))
    ends = zip([0, *cuts], [*cuts, len(valid)], strict=True)
    parts = [RoutingSums.from_tensors(live[a:b], replayed[a:b], valid[a:b]) for a, b in ends]
    at_once = RoutingSums.from_tensors(live, replayed, valid)
    assert sum(data.draw(st.permutations(parts))) == at_once
    n_layers, slots = live.shape[-2:]
    assert at_once + RoutingSums.empty(layer_ids=range(n_layers), slots=slots) == at_once


@pytest.mark.parametrize("block", [1, 1000, 5000])
def test_blocks_do_not_change_counts(monkeypatch, block):
    case = random_ids(9, 11, 4, 8, seed=1), random_ids(9, 11, 4, 8, seed=2), torch.rand(9, 11) < 0.7
    expected = RoutingSums.from_tensors(*case)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    assert RoutingSums.from_tensors(*case) == expected


def test_dtypes_may_differ_and_ids_may_be_large():
    ids = random_ids(6, 2, 8, experts=256)
    valid = torch.ones(6, dtype=torch.bool)
    for first in DTYPES:
        for second in DTYPES:
            assert compare_routing(ids.to(first), ids.to(second), valid)["differing_rows"] == 0
    large = torch.tensor([[[2**40, 1]]])
    assert compare_routing(large, torch.tensor([[[0, 1]]]), valid[:1])["jaccard"] == pytest.approx(1 / 3)


def test_any_leading_shape():
    live, replayed = random_ids(2, 3, 4, 8, seed=1), random_ids(2, 3, 4, 8, seed=2)
    valid = torch.ones(2, 3, dtype=torch.bool)
    flat = compare_routing(live.flatten(0, 1), replayed.flatten(0, 1), valid.flatten())
    assert compare_routing(live, replayed, valid) == flat
    single = compare_routing(live[0, 0], replayed[0, 0], torch.tensor(True))
    assert single == compare_routing(live[:1, 0], replayed[:1, 0], torch.tensor([True]))
    assert compare_routing(live[0, 0], replayed[0, 0], torch.tensor(False))["rows"] == 0


@pytest.mark.parametrize("rows", [0, 4])
def test_no_rows_is_nan_not_zero(rows):
    ids = random_ids(rows, 3, 2)
    got = compare_routing(ids, ids, torch.zeros(rows, dtype=torch.bool))
    assert got.pop("rows") == 0
    assert len(got) == 7
    assert all(map(math.isnan, got.values()))


def test_round_trips():
    sums = RoutingSums.from_tensors(random_ids(9, 3, 4), random_ids(9, 3, 4, seed=1), torch.ones(9, dtype=torch.bool))
    totals = sums.as_tensor()
    assert totals.dtype == torch.float64
    assert RoutingSums.from_tensor(totals, layer_ids=range(3), slots=4) == sums == pickle.loads(pickle.dumps(sums))


@pytest.mark.parametrize("other", [{"layer_ids": [0, 2], "slots": 2}, {"layer_ids": [0, 1], "slots": 3}])
def test_different_layers_or_slots_do_not_merge(other):
    with pytest.raises(DiagnosticsError, match="different kinds"):
        RoutingSums.empty(layer_ids=[0, 1], slots=2) + RoutingSums.empty(**other)


IDS = random_ids(2, 3, 4, 2)
YES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS, IDS[:, :1], YES), r"live \[2, 3, 4, 2\], replayed \[2, 1, 4, 2\]"),
        ((IDS, IDS, YES.T), r"valid \[3, 2\]"),
        ((IDS[0, 0, 0], IDS[0, 0, 0], YES[0, 0]), r"shapes: expected \[\.\.\., L, K\] twice"),
        ((IDS[..., :0], IDS[..., :0], YES), r"at least one layer and one slot"),
        ((IDS[..., :0, :], IDS[..., :0, :], YES), r"got \[\.\.\., L, K\] = \[2, 3, 0, 2\]"),
        ((*[torch.arange(256).expand(2, 3, 4, 256)] * 2, YES), r"at most 255 slots, got"),
        ((IDS.float(), IDS, YES), r"live: expected expert ids of dtype .* got torch.float32"),
        ((IDS, IDS.to(torch.int8), YES), r"replayed: .* got torch.int8"),
        ((IDS, IDS, YES.long()), r"valid: expected torch.bool, got torch.int64"),
        ((IDS, IDS.to("meta"), YES), r"devices: expected one"),
        ((IDS, IDS, YES, [0, 1, 2]), r"expected 4 distinct layer numbers from 0 up, got \(0, 1, 2\)"),
        ((IDS, IDS, YES, [0, 1, 2, 2]), r"expected 4 distinct layer numbers"),
        ((IDS, IDS, YES, [-1, 0, 1, 2]), r"expected 4 distinct layer numbers"),
    ],
)
def test_wrong_tensors_are_named(args, message):
    with pytest.raises(DiagnosticsError, match=message):
        compare_routing(*args)


@pytest.mark.parametrize("bad", [[-1, 5], [7, 7]])
@pytest.mark.parametrize("name", ["live", "replayed"])
def test_valid_rows_with_impossible_ids_are_placed(name, bad):
    sides = {"live": IDS.clone(), "replayed": IDS.clone()}
    sides[name][1, 2, 3] = torch.tensor(bad)
    with pytest.raises(
        DiagnosticsError, match=rf"{name}: expected distinct.*\n  at \(1, 2\), layer 13: \[{bad[0]}, {bad[1]}\]"
    ):
        compare_routing(**sides, valid=YES, layer_ids=[10, 11, 12, 13])


def test_impossible_ids_are_placed_beside_layers_that_are_missing():
    live, valid = IDS.clone(), torch.ones(2, 3, 4, dtype=torch.bool)
    live[:, 1, 2] = -1  # missing: it may be anything
    valid[:, 1, 2] = False
    live[1, 1, 3] = live[1, 2, 2] = 5
    with pytest.raises(DiagnosticsError, match=r"live: expected.*in 2;") as caught:
        compare_routing(live, IDS, valid)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "at (1, 1), layer 3: [5, 5]",
        "at (1, 2), layer 2: [5, 5]",
    ]
    live[1, 1, 3], live[1, 2, 2] = IDS[1, 1, 3], IDS[1, 2, 2]
    got = compare_routing(live, IDS, valid)
    assert (got["differing_rows"], got["order_differs"]) == (0, 0)


def test_the_most_slots_and_a_single_one():
    many = torch.arange(255).expand(2, 3, 255)
    for ids in (many, many[..., :1]):
        got = compare_routing(ids, ids.flip(-1), torch.ones(2, dtype=torch.bool))
        assert (got["differing_rows"], got["jaccard"], got["order_differs"]) == (0, 1, float(ids.shape[-1] > 1))


def test_ids_repeated_on_both_sides_are_an_error_and_not_an_overlap_above_k():
    twice = torch.tensor([[[7, 7]]])
    with pytest.raises(DiagnosticsError, match=r"live: expected distinct.*in 1; .*\n  at \(0,\), layer 0: \[7, 7\]"):
        compare_routing(twice, twice, torch.tensor([True]))
