"""Log-probability metrics against a 60-digit reference, over splits, ranks and hostile input."""

import math
import pickle
from decimal import Decimal, localcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.diagnostics import LogprobSums, RoutingSums, compare_logprobs
from r3.errors import DiagnosticsError

MEANS = ("abs_mean", "k1", "k3", "extreme_frac")
light = settings(deadline=None, max_examples=60)
logprob = st.floats(-40, 0, width=32)
tokens = st.lists(st.tuples(logprob, logprob, st.booleans()), min_size=1, max_size=30)


def tensors(rows, dtype=torch.float32):
    train, rollout, mask = zip(*rows, strict=True)
    return torch.tensor(train, dtype=dtype), torch.tensor(rollout, dtype=dtype), torch.tensor(mask)


def reference(rows, ratio=2):
    """The formulas as they are written, with 60 decimal digits, on exactly the values that the tensors hold."""
    with localcontext() as context:
        context.prec = 60
        diffs = [Decimal(train) - Decimal(rollout) for train, rollout, masked in rows if masked]
        if not diffs:
            return {"tokens": 0.0} | dict.fromkeys(("abs_mean", "abs_max", "k1", "k3", "extreme_frac"), math.nan)
        n = len(diffs)
        return {
            "tokens": float(n),
            "abs_mean": float(sum(map(abs, diffs)) / n),
            "abs_max": float(max(map(abs, diffs))),
            "k1": float(-sum(diffs) / n),
            "k3": float(sum(d.exp() - 1 - d for d in diffs) / n),
            "extreme_frac": sum(not 1 / Decimal(ratio) <= d.exp() <= ratio for d in diffs) / n,
        }


def assert_close(got, expected, rel=1e-12, scale=0.0):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        # k1 cancels and k3 loses about as many digits as d has zeros: the error is relative to |d|.
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-15 * scale, nan_ok=True), key


@light
@given(tokens)
def test_matches_the_formulas(rows):
    expected = reference(rows)
    assert_close(compare_logprobs(*tensors(rows)), expected, scale=0 if math.isnan(m := expected["abs_mean"]) else m)


def test_a_difference_is_train_minus_rollout():
    got = compare_logprobs(torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([True]))
    assert got["k1"] == -0.5
    assert got["k3"] == pytest.approx(math.exp(0.5) - 1.5, rel=1e-15)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_for_small_differences(size, sign):
    # Here exp(d) - 1 - d has lost all digits at 1e-8 and most at 1e-5: k3 is about d**2 / 2.
    rows = [(sign * size, 0.0, True)]
    got = compare_logprobs(*tensors(rows, torch.float64))["k3"]
    assert got == pytest.approx(reference(rows)["k3"], rel=1e-15 / size, abs=0)


@light
@given(st.lists(st.floats(-1e-6, 1e-6), min_size=1, max_size=20))
def test_k3_is_never_negative(diffs):
    train = torch.tensor(diffs, dtype=torch.float64)
    assert compare_logprobs(train, torch.zeros_like(train), torch.ones_like(train, dtype=torch.bool))["k3"] >= 0


@pytest.mark.parametrize("filler", [0.0, -9999.0, math.nan, math.inf, -math.inf])
def test_masked_tokens_never_count(filler):
    generator = torch.Generator().manual_seed(0)
    train, rollout = (-torch.rand(4, 6, generator=generator) for _ in range(2))
    mask = torch.rand(4, 6, generator=generator) < 0.5
    expected = compare_logprobs(train[mask], rollout[mask], torch.ones(int(mask.sum()), dtype=torch.bool))
    assert compare_logprobs(train.where(mask, filler), rollout, mask) == expected
    assert compare_logprobs(train, rollout.where(mask, filler), mask) == expected


@light
@given(tokens, st.data())
def test_merged_over_any_split_equals_at_once(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    sums = [LogprobSums.from_tensors(*tensors(part)) if part else LogprobSums.empty() for part in parts]
    merged = sum(data.draw(st.permutations(sums)), LogprobSums.empty()).metrics()
    at_once = compare_logprobs(*tensors(rows))
    exact = ("tokens", "abs_max", "extreme_frac")
    assert {key: merged[key] for key in exact} == pytest.approx(
        {key: at_once[key] for key in exact}, rel=0, nan_ok=True
    )
    assert_close(merged, at_once, scale=0 if math.isnan(m := at_once["abs_mean"]) else m)


def test_extreme_is_outside_the_closed_interval():
    edge = math.log(2)
    train = torch.tensor([edge, -edge, math.nextafter(edge, 1), -math.nextafter(edge, 1)], dtype=torch.float64)
    args = train, torch.zeros_like(train), torch.ones(4, dtype=torch.bool)
    assert compare_logprobs(*args)["extreme_frac"] == 0.5
    assert compare_logprobs(*args, extreme_ratio=2.1)["extreme_frac"] == 0
    assert compare_logprobs(*args, extreme_ratio=1.9)["extreme_frac"] == 1


def test_huge_differences():
    mask = torch.tensor([True])
    down = compare_logprobs(torch.tensor([-9999.0]), torch.tensor([0.0]), mask)
    assert down["k3"] == 9998
    up = LogprobSums.from_tensors(torch.tensor([0.0]), torch.tensor([-9999.0]), mask)
    assert up.metrics()["k3"] == math.inf
    assert up.metrics()["abs_max"] == 9999
    assert (up + up).metrics()["k3"] == math.inf
    largest = torch.finfo(torch.float32).max
    assert compare_logprobs(torch.tensor([-largest]), torch.tensor([largest]), mask)["abs_max"] == 2 * largest


def test_arithmetic_is_in_float64():
    train = torch.full((3, 1000), -1.0, dtype=torch.bfloat16, requires_grad=True)
    rollout = torch.full((3, 1000), -1.0 - 1e-4, dtype=torch.float32)
    got = LogprobSums.from_tensors(train, rollout, torch.ones(3, 1000, dtype=torch.bool))
    assert got.abs_sum == pytest.approx(3000 * (-1.0 - rollout[0, 0].item()), rel=1e-13)
    assert not got.as_tensor().requires_grad


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_no_tokens_is_nan_not_zero(shape):
    got = compare_logprobs(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    assert got.pop("tokens") == 0
    assert set(got) == {"abs_mean", "abs_max", "k1", "k3", "extreme_frac"}
    assert all(map(math.isnan, got.values()))


def test_round_trips():
    sums = LogprobSums.from_tensors(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, 0.0]), torch.tensor([True, True]))
    totals = sums.as_tensor()
    assert totals.dtype == torch.float64
    assert LogprobSums.from_tensor(totals) == sums == pickle.loads(pickle.dumps(sums))
    assert sums + LogprobSums.empty() == sums


def test_different_thresholds_do_not_merge():
    with pytest.raises(DiagnosticsError, match=r"extreme_ratio.*2\.0.*extreme_ratio.*5\.0"):
        LogprobSums.empty() + LogprobSums.empty(extreme_ratio=5.0)


ONES = torch.ones(2, 3)
YES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES, ONES[:, :1], YES), r"train \[2, 3\], rollout \[2, 1\], mask \[2, 3\]"),
        ((ONES, ONES, YES[0]), r"mask \[3\]"),
        ((ONES, ONES, ONES), r"mask: expected torch.bool, got torch.float32"),
        ((ONES.long(), ONES, YES), r"train: expected floating-point .* got torch.int64"),
        ((ONES, ONES.to("meta"), YES), r"devices: expected one, got cpu, meta, cpu"),
    ],
)
def test_wrong_tensors_are_named(args, message):
    with pytest.raises(DiagnosticsError, match=message):
        compare_logprobs(*args)


def test_all_problems_are_shown():
    with pytest.raises(DiagnosticsError, match=r"(?s)shapes.*rollout: expected.*mask: expected.*extreme_ratio"):
        compare_logprobs(ONES, ONES.long(), ONES[0], extreme_ratio=1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_tokens_are_counted_and_placed(bad):
    rollout = torch.zeros(5, 10)
    rollout[1:4] = bad
    mask = torch.ones(5, 10, dtype=torch.bool)
    mask[1, :5] = False
    with pytest.raises(DiagnosticsError) as caught:
        compare_logprobs(torch.zeros(5, 10), rollout, mask)
    text = str(caught.value)
    assert "25 of 45 tokens" in text
    assert "(1, 4)" not in text
    assert [f"at {p}:" in text for p in ((1, 5), (2, 0), (3, 0), (3, 1))] == [True, True, True, False]
    assert text.count("\n") == 16


def test_reduce_is_local_without_a_process_group():
    sums = LogprobSums.from_tensors(ONES, ONES, YES)
    assert sums.reduce() == sums


def _rank(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    train, rollout = (-torch.rand(5 + rank, generator=generator) for _ in range(2))
    mine = LogprobSums.from_tensors(train, rollout, torch.ones(5 + rank, dtype=torch.bool))
    empty_here = mine if rank else LogprobSums.empty()
    ids = torch.rand(4, 3, 6, generator=generator).topk(2).indices
    routing = RoutingSums.from_tensors(ids, ids.roll(1, 0), torch.ones(4, dtype=torch.bool))
    errors = []
    # The second pair has totals of different lengths, which no all-reduce could have told.
    for uneven in (LogprobSums.empty(extreme_ratio=2.0 + rank), RoutingSums.empty(layer_ids=range(1 + rank), slots=2)):
        with pytest.raises(DiagnosticsError) as caught:
            uneven.reduce()
        errors.append(str(caught.value))
    reduced = (mine.reduce(), empty_here.reduce(dist.group.WORLD), routing.reduce())
    results.put((rank, mine, routing, reduced, errors))
    dist.destroy_process_group()


def test_reduce_over_two_ranks(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, args=(tmp_path / "store", results), nprocs=2)
    found = sorted((results.get() for _ in range(2)), key=lambda result: result[0])
    (_, a, routing_a, reduced_a, errors_a), (_, b, routing_b, reduced_b, errors_b) = found
    assert reduced_a == reduced_b == (a + b, b, routing_a + routing_b)
    assert reduced_a[0].abs_max == max(a.abs_max, b.abs_max)
    for rank, errors in enumerate((errors_a, errors_b)):
        assert [f"rank {rank} has {kind}" in e for kind, e in zip(("LogprobSums", "RoutingSums"), errors, strict=True)]
