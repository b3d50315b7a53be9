"""Log-probability metrics against a 60-digit reference, scipy and numpy, over splits and hostile input."""

import math
import pickle
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3.diagnostics import LogprobSums, compare_logprobs
from r3.diagnostics.histogram import HIGHEST, RELATIVE_ERROR
from r3.errors import SHOWN, DiagnosticsError

QUANTILES = {"abs_p50": 500, "abs_p90": 900, "abs_p99": 990, "abs_p999": 999}
KEYS = (
    "abs_mean", "abs_std", "abs_max", *QUANTILES, "k1", "k3", "ppl_ratio", "chi2_token", "ess", "extreme_frac",
    "prob_abs_mean", "prob_abs_std", "prob_abs_max", "prob_pearson",
)  # fmt: skip
EXACT = ("tokens", "abs_max", *QUANTILES, "extreme_frac", "prob_abs_max")
light = settings(deadline=None, max_examples=60)
logprob = st.floats(-40, 0, width=32)
tokens = st.lists(st.tuples(logprob, logprob, st.booleans()), min_size=1, max_size=30)
# Ratios of these overflow, and the probabilities of some are 0 or 1 to float64. Smaller ones have squares without one.
extreme_logprob = st.one_of(
    st.floats(-(2.0**127), 0, width=32), st.floats(-1e-6, -1e-30), st.sampled_from([0.0, -9999.0, -1e-30])
)
extreme_tokens = st.lists(st.tuples(extreme_logprob, extreme_logprob), min_size=1, max_size=12)


def tensors(rows, dtype=torch.float32):
    train, rollout, mask = zip(*rows, strict=True)
    return torch.tensor(train, dtype=dtype), torch.tensor(rollout, dtype=dtype), torch.tensor(mask)


def as_float(value: Decimal) -> float:
    """Infinity beyond float64, as arithmetic in it would give."""
    return float(value) if abs(value) < Decimal("1.7e308") else math.copysign(math.inf, value)


def reference(rows, ratio=2):
    """The formulas as they are written, with 60 digits behind the smallest square, on exactly the tensors' values."""
    with localcontext() as context:
        small = [Decimal(side).adjusted() for train, rollout, _ in rows for side in (train, rollout) if side]
        context.prec = 60 + 2 * max(0, -min(small, default=0))
        context.Emax, context.Emin = 10**17, -(10**17)
        pairs = [(Decimal(train), Decimal(rollout)) for train, rollout, masked in rows if masked]
        if not pairs:
            return {"tokens": 0.0} | dict.fromkeys(KEYS, math.nan)
        n = len(pairs)
        diffs = [train - rollout for train, rollout in pairs]
        sizes = sorted(map(abs, diffs))
        # exp of what is beyond all float64 is an infinity or 0 there, whatever Decimal could make of it.
        ratios = [min(d, Decimal(10**6)).exp() for d in diffs]
        probs = [tuple(max(side, Decimal(-(10**6))).exp() for side in pair) for pair in pairs]
        apart = [abs(train - rollout) for train, rollout in probs]

        def mean(values):
            return sum(values, Decimal(0)) / n

        def deviation(values):
            centre = mean(values)
            return mean([(v - centre) ** 2 for v in values]).sqrt()

        k1 = -mean(diffs)
        return {
            "tokens": float(n),
            "abs_mean": float(mean(sizes)),
            "abs_std": float(deviation(sizes)),
            "abs_max": float(max(sizes)),
            **{key: float(sizes[-(-n * per_mille // 1000) - 1]) for key, per_mille in QUANTILES.items()},
            "k1": float(k1),
            "k3": as_float(mean([r - 1 - d for r, d in zip(ratios, diffs, strict=True)])),
            "ppl_ratio": as_float(min(k1, Decimal(10**6)).exp()),
            "chi2_token": as_float(mean([r * r - 1 for r in ratios])),
            "ess": float(sum(relative := _relative(diffs)) ** 2 / (n * sum(r * r for r in relative))),
            "extreme_frac": sum(not 1 / Decimal(ratio) <= r <= ratio for r in ratios) / n,
            "prob_abs_mean": float(mean(apart)),
            "prob_abs_std": float(deviation(apart)),
            "prob_abs_max": float(max(apart)),
            "prob_pearson": _pearson(probs, mean),
        }


def _relative(diffs):
    """Ratios over the largest of them, which the effective sample size does not depend on."""
    return [max(d - max(diffs), Decimal(-(10**6))).exp() for d in diffs]


def _pearson(pairs, mean):
    centre = [mean([pair[side] for pair in pairs]) for side in (0, 1)]
    centred = [tuple(value - c for value, c in zip(pair, centre, strict=True)) for pair in pairs]
    xx, yy, xy = (mean([pair[i] * pair[j] for pair in centred]) for i, j in ((0, 0), (1, 1), (0, 1)))
    return float(xy / (xx.sqrt() * yy.sqrt())) if xx and yy else math.nan


def assert_close(got, expected, rel=1e-12, scale=0.0):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if key in QUANTILES:
            # Beyond the bins a quantile is the largest of all.
            value = value if math.isnan(value) or value < 2**HIGHEST else got["abs_max"]
            assert got[key] == pytest.approx(value, rel=RELATIVE_ERROR * 1.0001, abs=2**-34, nan_ok=True), key
            continue
        # k1 cancels and k3 loses about as many digits as d has zeros: the error is relative to |d|.
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-15 * scale, nan_ok=True), key


def same(got, expected, keys):
    return {key: got[key] for key in keys} == pytest.approx({key: expected[key] for key in keys}, rel=0, nan_ok=True)


def scale_of(metrics):
    return 0.0 if math.isnan(metrics["abs_mean"]) else metrics["abs_mean"]


def assert_correlation(got, rows):
    """Where probabilities hardly vary, float64 itself has few digits of how they do."""
    probs = np.expm1([row[:2] for row in rows if row[2]]).reshape(-1, 2)
    narrowest = probs.std(0).min() if len(probs) else 0.0
    if narrowest > 1e-12 or len(probs) < 2:
        expected = reference(rows)["prob_pearson"]
        assert got["prob_pearson"] == pytest.approx(expected, abs=1e-12 + 1e-15 / max(narrowest, 1e-12), nan_ok=True)


def without(metrics, *keys):
    return {key: value for key, value in metrics.items() if key not in keys}


@light
@given(tokens)
@example([(-1.0, -2.0, True)])
def test_matches_the_formulas(rows):
    expected, got = reference(rows), compare_logprobs(*tensors(rows))
    pearson = "prob_pearson"
    assert_close(without(got, pearson), without(expected, pearson), rel=1e-11, scale=scale_of(expected))
    assert_correlation(got, rows)


@light
@given(extreme_tokens)
@example([(0.0, 0.0)])
@example([(0.0, -9999.0), (-9999.0, 0.0)])
@example([(0.0, -3e38), (-1e-6, -3e38)])
def test_matches_the_formulas_where_ratios_overflow(pairs):
    rows = [(train, rollout, True) for train, rollout in pairs]
    expected, got = reference(rows), compare_logprobs(*tensors(rows, torch.float64))
    # What depends on exp(d) has the error of d, which is 1e-16 of |d|.
    sensitive = ("ppl_ratio", "ess", "prob_pearson")
    scale = expected["abs_max"]
    assert_close(without(got, *sensitive), without(expected, *sensitive), rel=1e-11, scale=scale)
    if scale < 1e4:
        assert got["ess"] == pytest.approx(expected["ess"], rel=1e-10)
        assert got["ppl_ratio"] == pytest.approx(expected["ppl_ratio"], rel=1e-10, abs=1e-320)
    assert 0 < got["ess"] <= 1
    assert_correlation(got, rows)


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
@given(st.lists(st.tuples(logprob, logprob, st.booleans()), min_size=4, max_size=30), st.data())
@example([(-9.0, -1.0, True), (-1.0, -9.0, True), (-2.0, -2.0, True), (-1.0, -9.0, True)], None)
def test_merged_over_any_split_equals_at_once(rows, data):
    # Each split has two parts or more: without that, hypothesis hardly made any.
    if data is None:
        cuts, order = [1, 2, 2], lambda sums: sums
    else:
        cuts = sorted(data.draw(st.lists(st.integers(1, len(rows) - 1), min_size=1, max_size=4)))
        order = lambda sums: data.draw(st.permutations(sums))
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    sums = [LogprobSums.from_tensors(*tensors(part)) if part else LogprobSums.empty() for part in parts]
    merged = sum(order(sums), LogprobSums.empty())
    at_once = LogprobSums.from_tensors(*tensors(rows))
    assert torch.equal(merged.counts, at_once.counts)
    got, expected = merged.metrics(), at_once.metrics()
    assert same(got, expected, EXACT)
    assert_close(without(got, "prob_pearson"), without(expected, "prob_pearson"), scale=scale_of(expected))
    assert_correlation(got, rows)


def test_merging_keeps_the_digits_of_what_hardly_varies():
    """Standard deviations 1e9 times below the mean, of which sums of squares would keep none."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4000, generator=generator, dtype=torch.float64) * 1e-9
    train, rollout = -1.0 + noise[0], -3.0 + noise[1]
    mask = torch.ones(4000, dtype=torch.bool)
    merged = sum(
        LogprobSums.from_tensors(*(t[i : i + 100] for t in (train, rollout, mask))) for i in range(0, 4000, 100)
    )
    for got in (merged.metrics(), compare_logprobs(train, rollout, mask)):
        assert got["abs_std"] == pytest.approx((train - rollout).std(correction=0).item(), rel=1e-6)
        probs = train.exp().numpy(), rollout.exp().numpy()
        assert got["prob_pearson"] == pytest.approx(scipy.stats.pearsonr(*probs).statistic, abs=1e-6)
        assert got["prob_abs_std"] == pytest.approx(np.abs(probs[0] - probs[1]).std(), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_equals_scipy_and_numpy(parts):
    generator = torch.Generator().manual_seed(1)
    rollout = -torch.rand(100, 50, generator=generator, dtype=torch.float64).exponential_(1.0, generator=generator)
    train = (rollout + 0.05 * torch.randn(100, 50, generator=generator)).clamp_max(0)
    mask = torch.rand(100, 50, generator=generator) < 0.7
    chunks = zip(*(t.chunk(parts) for t in (train, rollout, mask)), strict=True)
    got = sum((LogprobSums.from_tensors(*chunk) for chunk in chunks), LogprobSums.empty()).metrics()
    d, probs = (train - rollout)[mask].numpy(), [side[mask].exp().numpy() for side in (train, rollout)]
    apart = np.abs(probs[0] - probs[1])
    weights = scipy.special.softmax(d)
    expected = {
        "abs_std": np.abs(d).std(),
        "chi2_token": np.expm1(2 * d).mean(),
        "ppl_ratio": np.exp(-train[mask].numpy().mean()) / np.exp(-rollout[mask].numpy().mean()),
        "ess": 1 / (len(d) * (weights**2).sum()),
        "prob_abs_mean": apart.mean(),
        "prob_abs_std": apart.std(),
        "prob_abs_max": apart.max(),
        "prob_pearson": scipy.stats.pearsonr(*probs).statistic,
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    for key, per_mille in QUANTILES.items():
        exact = np.quantile(np.abs(d), per_mille / 1000, method="inverted_cdf")
        assert got[key] == pytest.approx(exact, rel=RELATIVE_ERROR)


def test_probabilities_close_to_1_keep_their_digits():
    """Where p_train - p_rollout is 1e-12, the probabilities themselves have four digits of it."""
    rows = [(-1e-12 * i, -1e-12 * (i * 1.37 % 1), True) for i in range(1, 20)]
    expected, got = reference(rows), compare_logprobs(*tensors(rows, torch.float64))
    for key in ("prob_abs_mean", "prob_abs_std", "prob_abs_max", "prob_pearson"):
        assert got[key] == pytest.approx(expected[key], rel=1e-11, abs=0), key


@pytest.mark.parametrize("value", [-0.1, -1e-9, -700.0])
def test_values_that_do_not_vary_have_a_deviation_of_exactly_0_and_no_correlation(value):
    train = torch.full((1000,), value)
    sums = [LogprobSums.from_tensors(train[:n], 3 * train[:n], train[:n] < 0) for n in (1000, 333, 7)]
    for got in (sums[0].metrics(), sum(sums).metrics()):
        assert got["abs_std"] == got["prob_abs_std"] == 0
        assert math.isnan(got["prob_pearson"])


def test_one_token():
    got = compare_logprobs(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([True]))
    assert [got[key] for key in ("tokens", "abs_std", "ess", "abs_p50", "abs_p999", "prob_abs_std")] == [
        1,
        0,
        1,
        1,
        1,
        0,
    ]
    assert math.isnan(got["prob_pearson"])


def test_the_histogram_has_every_token_on_its_side():
    diffs = [0.0, -0.0, 0.3, -0.3, 0.31, 1e-12, -20000.0, 30000.0]
    train = torch.tensor(diffs, dtype=torch.float64)
    sums = LogprobSums.from_tensors(train, torch.zeros_like(train), torch.ones(8, dtype=torch.bool))
    for per_octave in (1, 2, 4, 8, 16):
        rows = sums.histogram(per_octave)
        assert sum(count for *_, count in rows) == 8
        assert rows == sorted(rows)
        assert all(a[1] <= b[0] for a, b in pairwise(rows))
        assert (0.0, 0.0, 2) in rows
        for d in diffs:
            assert any(lower <= d <= upper for lower, upper, _ in rows)
    assert sums.histogram() == [
        (-30000.0, -16384.0, 1), (-0.3125, -0.25, 1), (0.0, 0.0, 2), (0.0, 2**-34, 1), (0.25, 0.3125, 2),
        (16384.0, 30000.0, 1),
    ]  # fmt: skip
    with pytest.raises(DiagnosticsError, match="per_octave: expected 1, 2, 4, 8 or 16, got 3"):
        sums.histogram(3)


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
    assert (up + up).metrics()["k3"] == (up + up).metrics()["chi2_token"] == math.inf
    assert (up + up).metrics()["ess"] == 1
    assert down["ppl_ratio"] == math.inf
    assert up.metrics()["ppl_ratio"] == 0
    assert down["chi2_token"] == -1
    both = LogprobSums.from_tensors(torch.tensor([-9999.0]), torch.tensor([0.0]), mask) + up
    assert both.metrics()["ess"] == 0.5
    largest = torch.finfo(torch.float32).max
    assert compare_logprobs(torch.tensor([-largest]), torch.tensor([largest]), mask)["abs_max"] == 2 * largest


def test_arithmetic_is_in_float64():
    train = torch.full((3, 1000), -1.0, dtype=torch.bfloat16, requires_grad=True)
    rollout = torch.full((3, 1000), -1.0 - 1e-4, dtype=torch.float32)
    got = LogprobSums.from_tensors(train, rollout, torch.ones(3, 1000, dtype=torch.bool))
    assert got.diff_sum == pytest.approx(3000 * (-1.0 - rollout[0, 0].item()), rel=1e-13)
    assert got.metrics()["abs_mean"] == -1.0 - rollout[0, 0].item()
    assert not got.as_tensor().requires_grad


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_no_tokens_is_nan_not_zero(shape):
    got = compare_logprobs(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    assert got.pop("tokens") == 0
    assert set(got) == set(KEYS)
    assert LogprobSums.from_tensors(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape) > 0).histogram() == []
    assert all(map(math.isnan, got.values()))


def test_round_trips():
    train, rollout = torch.tensor([-1.1, -3.3], dtype=torch.float64), torch.tensor([-1.5, 0.0], dtype=torch.float64)
    for threshold in (2.0, 3.0):
        sums = LogprobSums.from_tensors(train, rollout, torch.tensor([True, True]), extreme_ratio=threshold)
        assert sums.extreme_ratio == threshold
        totals = sums.as_tensor()
        assert totals.dtype == torch.float64
        assert totals[2] == sums.diff_sum == pytest.approx(-2.9, rel=1e-15)
        back = LogprobSums.from_tensor(totals, extreme_ratio=threshold)
        assert back == sums == pickle.loads(pickle.dumps(sums)) == sums.with_totals(totals)
        assert back.metrics() == sums.metrics()
        assert sums + LogprobSums.empty(extreme_ratio=threshold) == sums
        assert (sums + sums).extreme_ratio == threshold


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


def test_each_side_of_a_wrong_dtype_is_named():
    with pytest.raises(DiagnosticsError) as caught:
        compare_logprobs(ONES.long(), ONES.int(), YES)
    assert [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]] == ["train", "rollout"]


@pytest.mark.parametrize(("bad", "shown"), [(1, "They are"), (SHOWN, "They are"), (SHOWN + 1, "First")])
def test_all_or_the_first_of_what_is_not_finite_are_shown(bad, shown):
    train = torch.zeros(SHOWN + 3)
    train[:bad] = math.nan
    with pytest.raises(DiagnosticsError) as caught:
        compare_logprobs(train, torch.zeros_like(train), torch.ones_like(train) > 0)
    first, *places = str(caught.value).splitlines()
    assert first.endswith(f"became non-finite. {shown}:")
    assert [place.strip() for place in places[: min(bad, SHOWN)]] == [
        f"at ({i},): train nan, rollout 0.0" for i in range(min(bad, SHOWN))
    ]


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
