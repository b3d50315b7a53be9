"""Corrections against NumPy references: padded, packed, one by one, over ranks; their gradients; hostile input."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from r3.diagnostics.correction_sums import CorrectionSums
from r3.diagnostics.corrections import (
    geometric_mask,
    gspo,
    icepop,
    masked_importance,
    product_mask,
    truncated_importance,
)
from r3.errors import DiagnosticsError

BY_SEQUENCE = {
    "truncated sequence": lambda *a, **k: truncated_importance(*a, level="sequence", **k),
    "masked sequence": lambda *a, **k: masked_importance(*a, level="sequence", **k),
    "geometric": geometric_mask,
    "product": product_mask,
    "gspo": gspo,
}
BY_TOKEN = {"truncated token": truncated_importance, "masked token": masked_importance, "icepop": icepop}
ALL = BY_TOKEN | BY_SEQUENCE


def reference(name, diffs):
    """Weights, which are kept, and which are outside the bounds, of one sequence's d, as the papers have them."""
    d = np.asarray(diffs, dtype=np.longdouble)
    ratio, n = np.exp(d), len(d)
    product, mean = np.exp(d.sum()), np.exp(d.sum() / n if n else np.longdouble(0))
    match name:
        case "truncated token":
            return np.minimum(ratio, 2), np.ones(n, bool), ratio > 2
        case "truncated sequence":
            return np.full(n, min(product, 5)), np.ones(n, bool), np.full(n, product > 5)
        case "masked token":
            return np.where(ratio <= 2, ratio, 0), ratio <= 2, ratio > 2
        case "masked sequence":
            kept = np.full(n, product <= 5)
            return np.where(kept, product, 0), kept, ~kept
        case "icepop":
            kept = (ratio >= 0.5) & (ratio <= 5)
            return np.where(kept, ratio, 0), kept, ~kept
        case "geometric":
            kept = np.full(n, 0.99 <= mean <= 1.01)
            return kept.astype(float), kept, ~kept
        case "product":
            kept = np.full(n, 0.5 <= product <= 2)
            return kept.astype(float), kept, ~kept
        case "gspo":
            return np.full(n, min(mean, np.exp(np.longdouble(10)))), np.ones(n, bool), np.full(n, mean > np.exp(10))
    raise AssertionError(name)


def reference_metrics(name, sequences):
    """The metrics of all sequences' d, of which some may have no tokens."""
    parts = [reference(name, diffs) for diffs in sequences if len(diffs)]
    weights, _, outside = (np.concatenate([part[i] for part in parts]) for i in range(3))
    n = len(weights)
    kind = "clipped" if name.startswith(("truncated", "gspo")) else "masked"
    squares = (weights**2).sum()
    found = {
        "tokens": n,
        f"{kind}_frac": outside.mean(),
        "weight_mean": weights.mean(),
        "ess": weights.sum() ** 2 / (n * squares) if squares else 0.0,
    }
    if name in BY_SEQUENCE:
        found |= {"sequences": len(parts), f"seq_{kind}_frac": np.mean([part[2][0] for part in parts])}
    return {key: float(value) for key, value in found.items()}


def ragged(seed=0, sequences=7, spread=0.3):
    """Per sequence: d of its tokens, multiples of 2^-18; one has no token, and some have all close to 0."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 12, sequences - 1), 0]
    scales = rng.choice([0.002, 0.05, spread, 2 * spread], sequences)
    diffs = [rng.normal(size=n) * scale for n, scale in zip(lengths, scales, strict=True)]
    return [(np.round(d * 2**18) / 2**18).astype(np.float32) for d in diffs]


def padded(sequences, filler=math.nan):
    """`[B, S]` train, rollout and mask; masked-in tokens are scattered, between others that must not count."""
    rng = np.random.default_rng(1)
    width = max(map(len, sequences)) + 3
    train = torch.full((len(sequences), width), filler)
    rollout, mask = train.clone(), torch.zeros(train.shape, dtype=torch.bool)
    for row, diffs in enumerate(sequences):
        at = torch.tensor(sorted(rng.choice(width, len(diffs), replace=False)), dtype=torch.long)
        # Multiples of 1/64 down to -4: train is exact in float32, and so is its difference to rollout.
        rollout[row, at] = -torch.from_numpy(rng.integers(0, 256, len(diffs)) / 64).float()
        train[row, at] = rollout[row, at] + torch.from_numpy(diffs)
        mask[row, at] = True
    return train, rollout, mask


def packed(sequences):
    """One row of all tokens in turns, so that no sequence is contiguous, with its ids; and the order to undo it."""
    ids = np.concatenate([np.full(len(diffs), row) for row, diffs in enumerate(sequences)])
    order = np.argsort(np.concatenate([np.arange(len(diffs)) for diffs in sequences]), kind="stable")
    train = torch.from_numpy(np.concatenate(sequences)[order])[None]
    return train, torch.from_numpy(ids[order]).long()[None], order


def close(got, expected, rel=1e-6):
    np.testing.assert_allclose(got.detach().double().numpy(), np.asarray(expected, float), rtol=rel, atol=1e-30)


def close_metrics(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-12), key


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("filler", [math.nan, math.inf, -9999.0])
def test_padded_rows_match_the_formulas(name, seed, filler):
    sequences = ragged(seed)
    train, rollout, mask = padded(sequences, filler)
    got = ALL[name](train, rollout, mask)
    assert (got.weights.shape, got.weights.dtype, got.mask.dtype) == (train.shape, torch.float32, torch.bool)
    for row, diffs in enumerate(sequences):
        weights, kept, _ = reference(name, diffs)
        close(got.weights[row][mask[row]], weights)
        assert got.mask[row][mask[row]].tolist() == kept.tolist()
    assert not got.mask[~mask].any()
    assert torch.equal(got.weights[~got.mask], torch.zeros(int((~got.mask).sum())))
    close_metrics(got.sums.metrics(), reference_metrics(name, sequences))


@pytest.mark.parametrize("name", ALL)
def test_packed_is_padded_is_one_by_one(name):
    sequences = ragged(3)
    train, rollout, mask = padded(sequences)
    by_row = ALL[name](train, rollout, mask)
    flat, ids, order = packed(sequences)
    extra = {"sequence_ids": ids, "count": len(sequences)} if name in BY_SEQUENCE else {}
    together = ALL[name](flat, torch.zeros_like(flat), torch.ones_like(flat, dtype=torch.bool), **extra)
    in_rows = [by_row.weights[mask].numpy(), by_row.mask[mask].numpy()]
    assert np.array_equal(together.weights[0].numpy(), in_rows[0][order])
    assert np.array_equal(together.mask[0].numpy(), in_rows[1][order])
    one_by_one = [ALL[name](train[[row]], rollout[[row]], mask[[row]]) for row in range(len(sequences))]
    assert torch.equal(torch.cat([one.weights for one in one_by_one]), by_row.weights)
    assert torch.equal(torch.cat([one.mask for one in one_by_one]), by_row.mask)
    for sums in (together.sums, sum(one.sums for one in one_by_one)):
        assert isinstance(sums, CorrectionSums)
        close_metrics(sums.metrics(), by_row.sums.metrics())


def test_ids_outside_the_mask_may_be_anything():
    train, mask = torch.tensor([[0.5, 0.1, 9.0]]), torch.tensor([[True, True, False]])
    ids = torch.tensor([[0, 0, -(10**9)]])
    got = product_mask(train, torch.zeros(1, 3), mask, sequence_ids=ids, count=1)
    assert got.weights.tolist() == [[1, 1, 0]]
    close(
        truncated_importance(train, torch.zeros(1, 3), mask, level="sequence", sequence_ids=ids, count=1).weights,
        [[math.exp(0.6), math.exp(0.6), 0]],
        rel=1e-6,
    )


def test_the_defaults_are_those_of_the_sources():
    train, mask = torch.full((1, 1), math.log(4.9)), torch.ones(1, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 1)
    assert truncated_importance(train, zeros, mask).weights.item() == 2
    assert truncated_importance(train, zeros, mask, level="sequence").weights.item() == pytest.approx(4.9)
    assert truncated_importance(train + 1, zeros, mask, level="sequence").weights.item() == pytest.approx(5)
    assert not masked_importance(train, zeros, mask).mask.item()
    assert masked_importance(train, zeros, mask, level="sequence").mask.item()
    assert icepop(train, zeros, mask).weights.item() == pytest.approx(4.9)
    assert not icepop(torch.full((1, 1), math.log(0.49)), zeros, mask).mask.item()
    assert icepop(train, zeros, mask, high=4.8).weights.item() == 0


def test_sums_say_which_correction_they_are_of():
    train, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for correct in (truncated_importance, masked_importance, icepop, geometric_mask, product_mask, gspo):
        assert correct(train, train, mask).sums.method == correct.__name__


@pytest.mark.parametrize("name", ALL)
def test_the_dtype_is_float32_or_that_of_float64(name):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        train = torch.zeros(1, 2, dtype=dtype)
        got = ALL[name](train, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
        assert got.weights.dtype == expected
        assert got.weights.tolist() == [[1, 1]]


# Gradients


@pytest.mark.parametrize("name", ALL)
def test_only_gspo_has_a_gradient_and_the_rollout_never(name):
    train, rollout, mask = padded(ragged(2))
    got = ALL[name](train.requires_grad_(), rollout.requires_grad_(), mask)
    assert got.weights.requires_grad == (name == "gspo")
    if name == "gspo":
        from_train, from_rollout = torch.autograd.grad(
            got.weights.sum(), [train, rollout], allow_unused=True, materialize_grads=True
        )
        assert from_train.isfinite().all()
        assert not from_rollout.any()
        assert torch.equal(from_train.bool(), mask)


def test_gspo_averaged_by_sequence_is_the_papers_objective():
    """J = mean over sequences of min(s A, clip(s) A), differentiated through s as it is defined."""
    sequences = ragged(5, spread=0.1)[:-1]
    train, rollout, mask = padded(sequences, filler=0.0)
    train = train.double().requires_grad_()
    advantages = torch.linspace(-1, 1, len(sequences), dtype=torch.float64)

    def clipped(ratio, advantage):
        return torch.minimum(ratio * advantage, ratio.clamp(1 - 0.02, 1 + 0.02) * advantage)

    lengths = mask.sum(1)
    exact = (((train - rollout) * mask).sum(1) / lengths).exp()
    (expected,) = torch.autograd.grad(clipped(exact, advantages).mean(), train)
    weights = gspo(train, rollout, mask).weights
    by_token = clipped(weights, advantages[:, None]) * mask
    objective = (by_token.sum(1) / lengths).mean()
    assert objective.item() == pytest.approx(clipped(exact, advantages).mean().item(), rel=1e-12)
    (got,) = torch.autograd.grad(objective, train)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert 0 < (expected.abs().sum(1) > 0).sum() < len(sequences), "some are clipped and some are not"


def test_gspo_has_no_gradient_above_its_bound():
    train = torch.tensor([[9.0, 9.0], [12.0, 12.0]], requires_grad=True)
    got = gspo(train, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    close(got.weights, [[math.exp(9)] * 2, [math.exp(10)] * 2])
    (gradient,) = torch.autograd.grad(got.weights.sum(), train)
    close(gradient, [[math.exp(9)] * 2, [0, 0]])
    assert got.sums.metrics()["seq_clipped_frac"] == 0.5


# Extremes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [89.0, 710.0, 1e6, 3e38])
def test_extreme_differences_give_no_nan(name, size):
    train = torch.tensor([[size, 0.0], [-size, 0.0], [size, -size]], requires_grad=True)
    mask = torch.ones(3, 2, dtype=torch.bool)
    got = ALL[name](train, torch.zeros(3, 2), mask)
    assert got.weights.isfinite().all()
    assert got.weights.detach().ge(0).all()
    assert all(map(math.isfinite, got.sums.metrics().values()))
    if got.weights.requires_grad:
        (gradient,) = torch.autograd.grad(got.weights.sum(), train)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
def test_no_tokens_is_no_correction_and_no_figures(name, shape):
    train = torch.full(shape, math.nan, requires_grad=True)
    got = ALL[name](train, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    assert (got.weights.shape, got.mask.shape) == (shape, shape)
    assert not got.weights.any()
    assert not got.mask.any()
    metrics = got.sums.metrics()
    assert metrics.pop("tokens") == 0
    assert metrics.pop("sequences", 0) == 0
    assert all(map(math.isnan, metrics.values()))
    if got.weights.requires_grad:
        assert not torch.autograd.grad(got.weights.sum(), train)[0].any()


@pytest.mark.parametrize("name", ["masked token", "masked sequence", "icepop", "geometric", "product"])
def test_where_all_is_dropped_nothing_is_effective(name):
    train, mask = torch.full((2, 3), 50.0), torch.ones(2, 3, dtype=torch.bool)
    got = ALL[name](train, torch.zeros(2, 3), mask)
    metrics = got.sums.metrics()
    assert not got.weights.any()
    assert (metrics["masked_frac"], metrics["weight_mean"], metrics["ess"]) == (1, 0, 0)


def test_the_bounds_themselves_are_inside_and_default_to_those_of_the_sources():
    zeros, mask = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool)
    nudge = torch.tensor([[-1e-12], [1e-12]], dtype=torch.float64)
    for correct, low, high in ((icepop, 0.5, 5.0), (geometric_mask, 0.99, 1.01), (product_mask, 0.5, 2.0)):
        logs = torch.tensor([[math.log(low)], [math.log(high)]], dtype=torch.float64)
        for bounds in (dict(low=low, high=high), {}):
            assert correct(logs, zeros, mask, **bounds).mask.all()
            assert not correct(logs + nudge, zeros, mask, **bounds).mask.any()


def test_sums_have_the_bounds_and_what_they_are_of():
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for correct, bounds in ((icepop, (0.5, 5.0)), (geometric_mask, (0.99, 1.01)), (product_mask, (0.5, 2.0))):
        sums = correct(zeros, zeros, mask).sums
        assert (sums.low, sums.high, sums.drops) == (*bounds, True)
    for correct in (truncated_importance, gspo):
        sums = correct(zeros, zeros, mask).sums
        assert (sums.low, sums.drops) == (0.0, False)
    tokens = truncated_importance(zeros, zeros, mask).sums
    rows = truncated_importance(zeros, zeros, mask, level="sequence", count=2).sums
    assert (tokens.by_sequence, tokens.sequences) == (False, 0)
    assert (rows.by_sequence, rows.sequences) == (True, 2)
    with pytest.raises(DiagnosticsError, match=r"got shape \[2, 3\] and count 3"):
        truncated_importance(zeros, zeros, mask, level="sequence", count=3)
    assert icepop(zeros, zeros, mask, high=math.exp(20)).mask.all()
    with pytest.raises(DiagnosticsError, match="expected bounds"):
        icepop(zeros, zeros, mask, high=math.exp(20) * 1.0001)


# Merging


@pytest.mark.parametrize("name", ALL)
def test_merged_over_any_split_is_computed_at_once(name):
    sequences = ragged(7, sequences=9)
    train, rollout, mask = padded(sequences)
    whole = ALL[name](train, rollout, mask).sums
    for sizes in ([9], [1] * 9, [4, 5], [2, 0, 7]):
        parts = zip(train.split(sizes), rollout.split(sizes), mask.split(sizes), strict=True)
        merged = sum(ALL[name](*part).sums for part in parts)
        close_metrics(merged.metrics(), whole.metrics())
    assert CorrectionSums.empty_like(whole).merge(whole) == whole


def test_corrections_of_different_kinds_do_not_merge():
    train, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    sums = [correct(train, train, mask).sums for correct in ALL.values()]
    sums.append(icepop(train, train, mask, high=4.0).sums)
    for i, one in enumerate(sums):
        for other in sums[i + 1 :]:
            with pytest.raises(DiagnosticsError, match="different kinds"):
                one.merge(other)


# Refusals


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused_with_its_place(name, bad, side):
    tensors = [torch.zeros(2, 3), torch.zeros(2, 3)]
    tensors[side][1, 2] = bad
    with pytest.raises(
        DiagnosticsError, match=r"expected finite ones where the mask is True, got others:\n  at \[1, 2\]"
    ):
        ALL[name](*tensors, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(name):
    ok, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(DiagnosticsError, match=r"train \[2, 3\], rollout \[3\]"):
        ALL[name](ok, torch.zeros(3), mask)
    with pytest.raises(DiagnosticsError, match=r"mask: expected torch.bool, got torch.float32"):
        ALL[name](ok, ok, mask.float())
    with pytest.raises(DiagnosticsError, match=r"rollout: expected floating-point log-probabilities, got torch.int64"):
        ALL[name](ok, ok.long(), mask)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_sequences_that_are_not_said_are_refused(name):
    flat, mask, ids = torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DiagnosticsError, match=r"expected rows \[B, S\] .* or sequence_ids"):
        BY_SEQUENCE[name](flat, flat, mask)
    with pytest.raises(DiagnosticsError, match="expected their count with them, got none"):
        BY_SEQUENCE[name](flat, flat, mask, sequence_ids=ids)
    with pytest.raises(DiagnosticsError, match=r"sequence_ids: expected torch.int64, got torch.int32"):
        BY_SEQUENCE[name](flat, flat, mask, sequence_ids=ids.int(), count=1)
    with pytest.raises(DiagnosticsError, match=r"sequence_ids \[3\]"):
        BY_SEQUENCE[name](flat, flat, mask, sequence_ids=ids[:3], count=1)
    for wrong in (-1, 2):
        with pytest.raises(DiagnosticsError, match=rf"expected 0 to 1 under the mask, got \[{wrong}, "):
            BY_SEQUENCE[name](flat, flat, mask, sequence_ids=ids + wrong, count=2)
    assert BY_SEQUENCE[name](flat, flat, mask, sequence_ids=ids, count=2).weights.tolist() == [1] * 4


@pytest.mark.parametrize(("low", "high"), [(2, 1), (1, 1), (-1, 2), (0.5, math.inf), (math.nan, 2), (0.5, math.nan)])
def test_bounds_that_make_no_sense_are_refused(low, high):
    train, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for correct in (icepop, geometric_mask, product_mask):
        with pytest.raises(DiagnosticsError, match=f"{correct.__name__}: expected bounds"):
            correct(train, train, mask, low=low, high=high)


def test_levels_and_clips_that_make_no_sense_are_refused():
    train, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for correct in (truncated_importance, masked_importance):
        with pytest.raises(DiagnosticsError, match="level: expected one of token, sequence, got 'row'"):
            correct(train, train, mask, level="row")
        for clip in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(DiagnosticsError, match="expected bounds"):
                correct(train, train, mask, clip=clip)


# Ranks


@pytest.fixture(scope="module")
def ranks():
    pair = Ranks(2)
    yield pair
    pair.close()


def slices(name, rows, world):
    """What each rank holds of padded rows, all of which are split along S."""
    train, rollout, mask = padded(ragged(11))
    pad = -train.shape[1] % world
    train, rollout = (torch.nn.functional.pad(tensor, (0, pad)) for tensor in (train, rollout))
    mask = torch.nn.functional.pad(mask, (0, pad))
    return train, rollout, mask


def on_a_rank(name, with_ids, break_rank=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    train, rollout, mask = slices(name, None, world)
    ids = torch.arange(len(train))[:, None].expand(train.shape)
    extra = {"sequence_ids": ids.chunk(world, 1)[rank].contiguous(), "count": len(train)} if with_ids else {}
    parts = [tensor.chunk(world, 1)[rank].clone() for tensor in (train, rollout, mask)]
    if rank == break_rank:
        parts[0][parts[2].nonzero()[0].split(1)] = math.nan
    parts[0].requires_grad_()
    got = BY_SEQUENCE[name](*parts, group=dist.group.WORLD, **extra)
    gradient = torch.autograd.grad(got.weights.sum(), parts[0])[0] if got.weights.requires_grad else None
    return got.weights.detach(), got.mask, got.sums.reduce().metrics(), gradient


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_sequences_spread_over_ranks_are_whole(ranks, name, with_ids):
    results = ranks.all(on_a_rank, name, with_ids)
    train, rollout, mask = slices(name, None, 2)
    whole = BY_SEQUENCE[name](train.requires_grad_(), rollout, mask)
    torch.testing.assert_close(torch.cat([r[0] for r in results], 1), whole.weights.detach(), rtol=1e-6, atol=0)
    assert torch.equal(torch.cat([r[1] for r in results], 1), whole.mask)
    for _, _, metrics, _ in results:
        close_metrics(metrics, whole.sums.metrics())
    if name == "gspo":
        (expected,) = torch.autograd.grad(whole.weights.sum(), train)
        torch.testing.assert_close(torch.cat([r[3] for r in results], 1), expected, rtol=1e-6, atol=0)


def test_a_rank_with_broken_values_stops_all(ranks):
    results = ranks.run(on_a_rank, "gspo", False, 1)
    assert all(isinstance(result, DiagnosticsError) for result in results), results
    assert "another rank of the group has found something wrong" in str(results[0])
    assert "got others:\n  at [" in str(results[1])
