"""Coverage against a count token by token, over splits and hostile input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.diagnostics import CoverageSums
from r3.errors import DiagnosticsError

light = settings(deadline=None, max_examples=80)
row = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-1, 6)), min_size=6, max_size=6)
batches = st.lists(row, min_size=1, max_size=5)


def tensors(batch):
    tokens, valid, versions = zip(*(zip(*row, strict=True) for row in batch), strict=True)
    return torch.tensor(valid), torch.tensor(tokens), torch.tensor(versions, dtype=torch.int32)


def reference(batch, trainer_version, routing=True, told=True):
    captured = invalid = unknown = 0
    lags = []
    for row in batch:
        for _, valid, version in [entry for entry in row if entry[0]][:-1]:
            captured += valid and routing
            invalid += not (valid and routing)
            if version >= 0 and told:
                lags.append(trainer_version - version)
            else:
                unknown += 1
    rows = captured + invalid
    return {
        "coverage": captured / rows if rows else math.nan,
        "rows_captured": captured,
        "rows_invalid": invalid,
        "pairs_missing": 0,
        "version_lag_mean": sum(lags) / len(lags) if lags else math.nan,
        "version_lag_max": max(lags) if lags else math.nan,
        "version_unknown": unknown,
    }


@light
@given(batches, st.integers(0, 9), st.booleans(), st.booleans(), st.integers(0, 5))
def test_matches_a_count_and_merges(batch, version, routing, told, cut):
    def sums(part):
        if not part:
            return CoverageSums.empty()
        valid, tokens, versions = tensors(part)
        return CoverageSums.from_tensors(valid if routing else None, tokens, versions if told else None, version)

    expected = reference(batch, version, routing, told)
    at_once, merged = sums(batch), sums(batch[cut:]) + sums(batch[:cut])
    assert merged == at_once
    assert list(at_once.metrics()) == list(expected)
    assert at_once.metrics() == pytest.approx(expected, nan_ok=True)
    assert at_once.with_totals(at_once.as_tensor()) == at_once


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_no_rows_is_nan_not_zero(shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    got = CoverageSums.from_tensors(nothing, nothing, nothing.int(), 3).metrics()
    counts = ("rows_captured", "rows_invalid", "pairs_missing", "version_unknown")
    assert [got.pop(key) for key in counts] == [0, 0, 0, 0]
    assert all(map(math.isnan, got.values()))


def test_a_rollout_of_one_token_has_no_row_and_padding_may_be_on_either_side():
    tokens = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    everywhere = torch.ones_like(tokens)
    assert CoverageSums.from_tensors(everywhere, tokens, None, 0).rows_captured == 0 + 1 + 2


def test_rows_that_lack_some_layers_are_not_captured_and_their_missing_pairs_are_counted():
    tokens = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()
    valid = torch.ones(2, 6, 3, dtype=torch.bool)
    valid[0, 1] = torch.tensor([True, False, False])
    valid[0, 3] = False
    valid[1, 3, 2] = False
    valid[0, 4:, 1] = valid[1, :3, 0] = False  # the last token, and padding: no rows
    sums = CoverageSums.from_tensors(valid, tokens, None, 0)
    assert (sums.rows_captured, sums.rows_invalid, sums.pairs_missing) == (3, 3, 3)
    whole = CoverageSums.from_tensors(valid.all(-1), tokens, None, 0)
    assert (whole.rows_captured, whole.rows_invalid, whole.pairs_missing) == (3, 3, 0)
    assert (sums + whole).metrics()["pairs_missing"] == 3


def test_the_largest_lag_is_that_of_known_versions_alone():
    tokens = torch.ones(1, 3, dtype=torch.bool)
    known = CoverageSums.from_tensors(tokens, tokens, torch.tensor([[4, 3, 0]]), 5)
    unknown = CoverageSums.from_tensors(tokens, tokens, torch.full((1, 3), -1), 5)
    assert (known.lag_max, unknown.lag_max) == (2, -math.inf)
    for sums in (known + unknown, unknown + known, CoverageSums.empty() + known):
        assert sums.metrics()["version_lag_max"] == 2


YES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((YES[:1], YES, None, 0), r"valid: expected \[B, S\] as `tokens` is, \[2, 3\], got \[1, 3\]"),
        ((torch.ones(2, 2, 4) > 0, YES, None, 0), r"valid: expected .*\[2, 3\], got \[2, 2, 4\]"),
        ((YES, YES, torch.ones(2, 3, 4).int(), 0), r"versions: expected .*\[2, 3\], got \[2, 3, 4\]"),
        ((YES, YES, YES, 0), "versions: expected integers, got torch.bool"),
        ((YES, YES, YES * 1j, 0), "versions: expected integers, got torch.complex64"),
        ((YES.int(), YES, None, 0), "valid: expected torch.bool, got torch.int32"),
        ((YES, YES.long(), None, 0), "tokens: expected torch.bool, got torch.int64"),
        ((YES, YES, YES.float(), 0), "versions: expected integers, got torch.float32"),
        ((YES, YES, YES.int().to("meta"), 0), "versions: expected on cpu, got meta"),
        ((None, YES[0], None, 0), r"tokens: expected \[B, S\]"),
    ],
)
def test_wrong_tensors_are_named(args, message):
    with pytest.raises(DiagnosticsError, match=message):
        CoverageSums.from_tensors(*args)


def test_counts_beyond_those_of_float32_stay_whole():
    many = CoverageSums(rows_captured=2**24 + 1, rows_invalid=1, pairs_missing=2**25 + 1, version_known=3, lag_sum=1)
    found = CoverageSums.empty().with_totals(many.as_tensor())
    assert (found.rows_captured, found.pairs_missing) == (2**24 + 1, 2**25 + 1)
