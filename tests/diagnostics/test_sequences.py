"""Sequence metrics against the formulas, over rows and splits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3.diagnostics import SequenceSums, sequence_totals
from r3.errors import DiagnosticsError

light = settings(deadline=None, max_examples=60)
token = st.tuples(st.floats(-5, 5), st.booleans(), st.integers(0, 5))
KEYS = ("chi2_seq", "seq_ppl_ratio", "seq_log_ratio_max")


def tensors(rows):
    values, mask, ids = zip(*rows, strict=True)
    mask = torch.tensor(mask)
    return torch.tensor(values, dtype=torch.float64), mask, torch.tensor(ids).where(mask, -7)


def reference(rows):
    by_sequence = {}
    for value, masked, sequence in rows:
        if masked:
            by_sequence.setdefault(sequence, []).append(value)
    sums = np.array([math.fsum(values) for values in by_sequence.values()])
    lengths = np.array([len(values) for values in by_sequence.values()])
    if not len(sums):
        return {"sequences": 0.0} | dict.fromkeys(KEYS, math.nan)
    return {
        "sequences": float(len(sums)),
        "chi2_seq": np.mean(np.exp(sums) ** 2 - 1),
        "seq_ppl_ratio": np.mean(np.exp(-sums / lengths)),
        "seq_log_ratio_max": np.abs(sums).max(),
    }


@light
@given(st.lists(token, min_size=1, max_size=30))
def test_matches_the_formulas(rows):
    got = SequenceSums.from_totals(*sequence_totals(*tensors(rows), 6)).metrics()
    assert got == pytest.approx(reference(rows), rel=1e-9, abs=1e-13, nan_ok=True)


@light
@given(st.lists(token, min_size=1, max_size=30), st.integers(0, 30))
def test_totals_of_pieces_add_up_and_sums_of_sequences_merge(rows, cut):
    pieces = [tensors(part) for part in (rows[:cut], rows[cut:]) if part]
    totals = [sequence_totals(*piece, 6) for piece in pieces]
    sums, tokens = (sum(part) for part in zip(*totals, strict=True))
    whole_sums, whole_tokens = sequence_totals(*tensors(rows), 6)
    assert torch.equal(tokens, whole_tokens)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-12, atol=1e-13)
    at_once = SequenceSums.from_totals(whole_sums, whole_tokens)
    split = SequenceSums.from_totals(whole_sums[:2], whole_tokens[:2]) + SequenceSums.from_totals(
        whole_sums[2:], whole_tokens[2:]
    )
    assert split.metrics() == pytest.approx(at_once.metrics(), rel=1e-13, nan_ok=True)
    assert at_once + SequenceSums.empty() == at_once == SequenceSums().with_totals(at_once.as_tensor())


def test_any_shape_and_dtype():
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    ids = torch.arange(3)[:, None].expand(3, 4)
    sums, tokens = sequence_totals(values, torch.ones(3, 4, dtype=torch.bool), ids, 4)
    assert sums.tolist() == [*values.detach().double().sum(1).tolist(), 0.0]
    assert tokens.tolist() == [4, 4, 4, 0]
    assert (sums.dtype, tokens.dtype, sums.requires_grad) == (torch.float64, torch.int64, False)


def test_ratios_that_overflow():
    up = SequenceSums.from_totals(torch.tensor([400.0, -1.0]), torch.tensor([2, 1])).metrics()
    assert (up["chi2_seq"], up["seq_log_ratio_max"]) == (math.inf, 400)
    down = SequenceSums.from_totals(torch.tensor([-2000.0]), torch.tensor([2])).metrics()
    assert (down["chi2_seq"], down["seq_ppl_ratio"]) == (-1, math.inf)
    small = SequenceSums.from_totals(torch.tensor([1e-12], dtype=torch.float64), torch.tensor([1])).metrics()
    assert small["chi2_seq"] == pytest.approx(2e-12, rel=1e-10)


@pytest.mark.parametrize("count", [0, 3])
def test_no_tokens_is_nan_not_zero(count):
    nothing = torch.zeros(2, 3)
    totals = sequence_totals(nothing, nothing > 0, nothing.long() - 1, count)
    assert [list(total.shape) for total in totals] == [[count]] * 2
    got = SequenceSums.from_totals(*totals).metrics()
    assert got == pytest.approx({"sequences": 0.0} | dict.fromkeys(KEYS, math.nan), nan_ok=True)


D, YES, IDS = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((D, YES[0], IDS, 2), r"values \[2, 3\], mask \[3\]"),
        ((D, D, IDS, 2), "mask: expected torch.bool, got torch.float32"),
        ((D.long(), YES, IDS, 2), "values: expected floating-point"),
        ((D, YES, IDS.int(), 2), "sequence_ids: expected torch.int64, got torch.int32"),
        ((D, YES, IDS + 2, 2), r"sequence_ids: expected 0 to 1 under the mask, got \[2, 2, 2, 2, 2, 2\]"),
        ((D, YES, IDS - 1, 2), "sequence_ids: expected 0 to 1"),
        ((D / 0, YES, IDS, 2), "values: expected finite ones under the mask, got 6 of 6"),
        ((D, YES, IDS, -1), "count: expected 0 or more"),
    ],
)
def test_wrong_tensors_are_named(args, message):
    with pytest.raises(DiagnosticsError, match=message):
        sequence_totals(*args)


def test_totals_that_are_not_finite_are_named():
    with pytest.raises(DiagnosticsError, match=r"got 1 of 2 that are not, of sequences \[2\]"):
        SequenceSums.from_totals(torch.tensor([0.0, math.nan, math.inf]), torch.tensor([1, 0, 4]))
    with pytest.raises(DiagnosticsError, match=r"floating diff_sum \[n\]"):
        SequenceSums.from_totals(torch.zeros(2), torch.zeros(3))
