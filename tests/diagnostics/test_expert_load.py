"""Load of the experts, margins and Jaccard against scipy, scikit-learn and numpy, over splits and hostile input."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from r3.diagnostics import (
    CoverageSums,
    LoadSums,
    LogprobSums,
    MarginSums,
    RoutingSums,
    SequenceSums,
    compare_routing,
    routing_pair,
    sequence_totals,
)
from r3.diagnostics.histogram import RELATIVE_ERROR
from r3.errors import DiagnosticsError

EXPERTS, LAYERS, SLOTS = 7, (2, 5, 6), 3
light = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10_000)
cuts = st.lists(st.integers(0, 20), max_size=4)


def case(seed, rows=20):
    """(live, replayed, valid), the two alike in about half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, len(LAYERS), EXPERTS, generator=generator)
    live = scores.topk(SLOTS).indices
    replayed = (scores + 0.1 * torch.rand(scores.shape, generator=generator)).topk(SLOTS).indices.to(torch.uint8)
    return live, replayed, torch.rand(rows, generator=generator) < 0.8


def parts(tensors, cuts):
    ends = sorted(cuts)
    for a, b in zip([0, *ends], [*ends, 20], strict=True):
        yield tuple(t[a:b] for t in tensors)


def load(live, replayed, valid):
    return LoadSums.from_tensors(live, replayed, valid, num_experts=EXPERTS, layer_ids=LAYERS)


def reference(live, replayed, valid):
    shares = np.array(
        [
            [
                np.bincount(side[valid][:, i].flatten(), minlength=EXPERTS) / (valid.sum() * SLOTS)
                for i in range(len(LAYERS))
            ]
            for side in (live.numpy(), replayed.numpy())
        ]
    )
    entropies = scipy.stats.entropy(shares, axis=-1, base=EXPERTS).mean(-1)
    worst = (shares.max(-1) / shares.mean(-1)).max(-1)
    return {
        "load_entropy/live": entropies[0],
        "load_entropy/rollout": entropies[1],
        "load_max/live": worst[0],
        "load_max/rollout": worst[1],
        "load_shift": np.mean([0.5 * np.abs(a - b).sum() for a, b in zip(*shares, strict=True)]),
    }


@light
@given(seeds, cuts, st.integers(1, 40))
def test_load_equals_scipy_and_merges(seed, cuts, block):
    tensors = case(seed)
    at_once = load(*tensors)
    assert list(at_once.metrics()) == list(reference(*tensors[:2], tensors[2].numpy()))
    assert at_once.metrics() == pytest.approx(reference(*tensors[:2], tensors[2].numpy()), rel=1e-13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_pair, "BLOCK_ELEMENTS", block)
        merged = sum(
            (load(*part) for part in parts(tensors, cuts)), LoadSums.empty(num_experts=EXPERTS, layer_ids=LAYERS)
        )
    assert merged == at_once
    assert torch.equal(merged.counts, at_once.counts)
    assert at_once.with_totals(at_once.as_tensor()) == at_once


def test_even_and_uneven_loads():
    even = torch.arange(6).view(2, 1, 3)
    got = LoadSums.from_tensors(even, even, torch.tensor([True, True]), num_experts=6, layer_ids=[0]).metrics()
    assert got == pytest.approx(
        {"load_entropy/live": 1, "load_entropy/rollout": 1, "load_max/live": 1, "load_max/rollout": 1, "load_shift": 0}
    )
    one = torch.zeros(4, 1, 1, dtype=torch.int64)
    other = one + 1
    yes = torch.ones(4, dtype=torch.bool)
    got = LoadSums.from_tensors(one, other, yes, num_experts=8, layer_ids=[0]).metrics()
    assert got == {
        "load_entropy/live": 0, "load_entropy/rollout": 0, "load_max/live": 8, "load_max/rollout": 8, "load_shift": 1,
    }  # fmt: skip
    single = LoadSums.from_tensors(one, one, yes, num_experts=1, layer_ids=[0]).metrics()
    assert math.isnan(single["load_entropy/live"])
    assert (single["load_max/live"], single["load_shift"]) == (1, 0)


def test_loads_of_two_experts_by_hand():
    live = torch.tensor([[[0], [1]], [[0], [1]], [[0], [0]], [[1], [0]]])
    yes = torch.ones(4, dtype=torch.bool)
    got = LoadSums.from_tensors(live, live.flip(0), yes, num_experts=2, layer_ids=[0, 1]).metrics()
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert got["load_entropy/live"] == pytest.approx((quarter + 1) / 2)
    assert (got["load_max/live"], got["load_shift"]) == (1.5, 0)


def test_a_layer_that_is_missing_beside_a_single_expert():
    ids, valid = torch.zeros(2, 2, 1, dtype=torch.uint8), torch.tensor([[True, False], [True, True]])
    sums = LoadSums.from_tensors(ids, ids, valid, num_experts=1, layer_ids=[0, 1])
    assert sums.counts.tolist() == [[[2], [1]]] * 2


def test_the_table_counts_slots_by_layer_and_expert():
    live = torch.tensor([[[0, 1]], [[1, 2]], [[0, 2]]])
    valid = torch.tensor([True, True, False])
    table = LoadSums.from_tensors(live, live.flip(0), valid, num_experts=4, layer_ids=[9]).table()
    assert table == {"layer_ids": [9], "live": [[1, 2, 1, 0]], "rollout": [[1, 1, 2, 0]]}


@pytest.mark.parametrize("rows", [0, 4])
def test_no_rows_is_nan_not_zero(rows):
    live, replayed, valid = case(0, rows)
    assert all(map(math.isnan, load(live, replayed, valid & False).metrics().values()))
    margins = torch.zeros(rows, len(LAYERS))
    assert all(map(math.isnan, MarginSums.from_tensors(margins, live, replayed, valid & False).metrics().values()))


@pytest.mark.parametrize("bad", [-1, EXPERTS, 300])
@pytest.mark.parametrize("name", ["live", "replayed"])
def test_ids_out_of_range_are_refused_and_ignored_where_not_valid(name, bad):
    live, replayed, _ = case(0)
    sides = {"live": live.clone(), "replayed": replayed.long()}
    sides[name][3, 1, 2] = bad
    valid = torch.ones(20, dtype=torch.bool)
    with pytest.raises(
        DiagnosticsError, match=rf"{name}: expected expert ids from 0 to 6.*got {min(bad, 0)} to {max(bad, 6)}"
    ):
        load(**sides, valid=valid)
    valid[3] = False
    assert load(**sides, valid=valid) == load(live, replayed, valid)


def test_other_layers_or_experts_do_not_merge():
    with pytest.raises(DiagnosticsError, match="different kinds"):
        LoadSums.empty(num_experts=4, layer_ids=[0]) + LoadSums.empty(num_experts=5, layer_ids=[0])
    with pytest.raises(DiagnosticsError, match="num_experts: expected 1 or more"):
        LoadSums.from_tensors(*case(0), num_experts=0, layer_ids=LAYERS)


@light
@given(seeds)
def test_jaccard_equals_that_of_scikit_learn(seed):
    live, replayed, valid = case(seed)
    sets = [
        torch.zeros(*side.shape[:2], EXPERTS).scatter(-1, side.long(), 1)[valid].flatten(0, 1)
        for side in (live, replayed)
    ]
    expected = jaccard_score(*(side.numpy().astype(bool) for side in sets), average="samples")
    assert compare_routing(live, replayed, valid)["jaccard"] == pytest.approx(expected, rel=1e-13)


@light
@given(seeds, cuts)
def test_margins_equal_numpy_and_merge(seed, cuts):
    live, replayed, valid = case(seed)
    generator = torch.Generator().manual_seed(seed)
    margins = torch.rand(20, len(LAYERS), generator=generator).pow(8)
    margins[0, 0] = 0
    at_once = MarginSums.from_tensors(margins, live, replayed, valid)
    got = at_once.metrics()
    differs = (live.sort(-1).values != replayed.long().sort(-1).values).any(-1)
    for side, chosen in (("agreeing", ~differs), ("differing", differs)):
        values = margins[chosen & valid[:, None]].double().numpy()
        for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
            exact = np.quantile(values, q, method="inverted_cdf")
            assert got[f"margin/{side}_{name}"] == pytest.approx(exact, rel=RELATIVE_ERROR, abs=2**-34)
    merged = [MarginSums.from_tensors(*part) for part in parts((margins, live, replayed, valid), cuts)]
    assert sum(merged, MarginSums.empty()) == at_once
    assert at_once.with_totals(at_once.as_tensor()) == at_once
    assert int(at_once.counts[1].sum()) == sum(
        at_once_layer[s]
        for at_once_layer in RoutingSums.from_tensors(live, replayed, valid).shared
        for s in range(SLOTS)
    )


def test_margins_without_an_expert_left_are_infinite():
    live, replayed, valid = case(0)
    margins = torch.full((20, len(LAYERS)), math.inf)
    assert MarginSums.from_tensors(margins, live, replayed, valid).metrics()["margin/agreeing_p10"] == math.inf


def test_margins_of_every_block_count_and_are_checked(monkeypatch):
    live, replayed, valid = case(0)
    margins = torch.rand(20, len(LAYERS), generator=torch.Generator().manual_seed(0))
    at_once = MarginSums.from_tensors(margins, live, replayed, valid)
    monkeypatch.setattr(routing_pair, "BLOCK_ELEMENTS", 3 * len(LAYERS) * SLOTS)
    assert MarginSums.from_tensors(margins, live, replayed, valid) == at_once
    for row in (0, 10, 19):
        broken = margins.clone()
        broken[row, 2] = -1
        with pytest.raises(DiagnosticsError, match="got 1 negative or NaN"):
            MarginSums.from_tensors(broken, live, replayed, valid | True)


@pytest.mark.parametrize("bad", [math.nan, -0.5])
def test_margins_that_cannot_be_are_refused_and_ignored_where_not_valid(bad):
    live, replayed, valid = case(0)
    margins = torch.ones(20, len(LAYERS))
    valid[4] = True
    margins[4, 1] = bad
    with pytest.raises(DiagnosticsError, match="expected 0 or more in every valid row, got 1 negative or NaN"):
        MarginSums.from_tensors(margins, live, replayed, valid)
    valid[4] = False
    assert MarginSums.from_tensors(margins, live, replayed, valid).metrics()["margin/agreeing_p50"] == pytest.approx(
        1, rel=0.04
    )


def test_wrong_margins_are_named():
    live, replayed, valid = case(0)
    for margins in (torch.ones(20, 2), torch.ones(20, 3, dtype=torch.int64), torch.ones(20, 3, device="meta")):
        with pytest.raises(DiagnosticsError, match=r"margins: expected floating \[\.\.\., L\] = \[20, 3\] on cpu, got"):
            MarginSums.from_tensors(margins, live, replayed, valid)


@pytest.mark.gpu
def test_a_gpu_counts_what_a_cpu_counts(monkeypatch):
    monkeypatch.setattr(routing_pair, "BLOCK_ELEMENTS", 1000)
    live, replayed, valid = case(0, 500)
    generator = torch.Generator().manual_seed(0)
    margins = torch.rand(500, len(LAYERS), generator=generator)
    rollout = -torch.rand(500, generator=generator)
    train, ids = rollout + 0.1 * torch.randn(500, generator=generator), torch.randint(9, (500,), generator=generator)
    versions = torch.randint(-1, 4, (20, 25), generator=generator)

    def every(device):
        here = lambda *tensors: [t.to(device) for t in tensors]
        pair = here(live.to(torch.uint8), replayed, valid)
        totals = sequence_totals(*here(train - rollout, valid, ids), 9)
        return [
            RoutingSums.from_tensors(*pair),
            load(*pair),
            MarginSums.from_tensors(margins.to(device), *pair),
            CoverageSums.from_tensors(*here(valid.view(20, 25), valid.view(20, 25), versions), 5),
            LogprobSums.from_tensors(*here(train, rollout, valid)),
            SequenceSums.from_totals(*totals),
        ]

    on_gpu, on_cpu = every("cuda"), every("cpu")
    assert on_gpu[:4] == on_cpu[:4]
    assert torch.equal(on_gpu[4].counts, on_cpu[4].counts)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.metrics() == pytest.approx(b.metrics(), rel=1e-12)
    with pytest.raises(DiagnosticsError, match="got 1 to 7"):
        LoadSums.from_tensors(*[t.cuda() for t in (live + 1, live, valid)], num_experts=7, layer_ids=LAYERS)
