"""A delta gives the other side the same bits, and never a mixture of versions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3 import SyncError
from r3.weight_sync.delta import DeltaBase, apply_changes, changes


@given(
    numel=st.integers(1, 3000),
    changed=st.lists(st.integers(0, 2999), max_size=40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8]),
)
def test_changes_make_the_old_tensor_the_new_one(numel, changed, dtype):
    of = torch.Generator().manual_seed(numel)
    old = (torch.randn(numel, generator=of) * 50).to(dtype)
    new = old.clone()
    for at in changed:
        new.view(torch.uint8)[at % new.view(torch.uint8).numel()] ^= 1 + at % 255
    found = changes(new, old)
    if found is None:
        assert len(set(changed)) * (1 + old.element_size()) >= new.nbytes
        return
    gaps, values = found
    apply_changes(old, gaps, values)
    assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def test_zero_of_the_other_sign_and_nan_bits_are_changes():
    old = torch.tensor([0.0, torch.nan, 1.0] + [5.0] * 20)
    new = old.clone()
    new[0] = -0.0
    new.view(torch.int32)[1] ^= 1
    gaps, values = changes(new, old)
    assert values.numel() == 2
    apply_changes(old, gaps, values)
    assert torch.equal(old.view(torch.int32), new.view(torch.int32))


def test_a_change_costs_about_one_byte_more_than_its_value():
    old = torch.randn(1_000_000).bfloat16()
    new = old.clone()
    at = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))[:20_000]
    new.view(torch.int16)[at] ^= 1
    gaps, values = changes(new, old)
    assert (gaps.nbytes + values.nbytes) < 20_000 * 3.1


def test_a_tensor_that_changed_much_is_sent_whole_and_one_that_did_not_not_at_all():
    here, there = DeltaBase(), DeltaBase()
    first = [("a", torch.randn(40, 50)), ("b", torch.randn(7)), ("c", torch.randn(64, 64))]
    assert [n for n, _ in there.decode(["a", "b", "c"], here.encode(first))] == ["a", "b", "c"]
    few = first[2][1].clone()
    few[3, 5] += 1
    second = [("a", torch.randn(40, 50)), ("b", first[1][1]), ("c", few)]
    sent = here.encode(second)
    assert [name for name, _ in sent] == ["a", "c\0gaps", "c\0values"]
    for (name, got), (expected, tensor) in zip(there.decode(["a", "b", "c"], sent), second, strict=True):
        assert name == expected
        assert torch.equal(got, tensor)


def test_what_the_sender_does_with_its_tensors_later_does_not_reach_its_base():
    here = DeltaBase()
    weight = torch.randn(8)
    here.encode([("a", weight)])
    weight += 1
    assert [name for name, _ in here.encode([("a", weight)])] == ["a"]
    assert here.encode([("a", weight)]) == []


@pytest.mark.parametrize(
    ("names", "sent", "message"),
    [
        (["b"], [], "b: neither sent nor in the base"),
        (["a"], [("b", torch.zeros(2))], "not announced"),
        (
            ["a"],
            [("a\0gaps", torch.tensor([9], dtype=torch.uint8)), ("a\0values", torch.zeros(1, dtype=torch.int32))],
            "do not fit",
        ),
        (
            ["a"],
            [("a\0gaps", torch.tensor([0], dtype=torch.uint8)), ("a\0values", torch.zeros(2, dtype=torch.int32))],
            "do not fit",
        ),
        (
            ["a"],
            [("a\0gaps", torch.tensor([0], dtype=torch.uint8)), ("a\0values", torch.zeros(1, dtype=torch.int16))],
            "do not fit",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused(names, sent, message):
    base = DeltaBase(version=1, tensors={"a": torch.zeros(4)})
    with pytest.raises(SyncError, match=message):
        base.decode(names, sent)
