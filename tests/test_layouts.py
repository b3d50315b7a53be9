"""Padded, packed and sliced routing: each layout and its way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3 import RolloutRouting, RoutingError
from r3.routing import Packing, prefetch, shard, unshard

EXPERTS = {torch.uint8: 200, torch.int16: 1000, torch.int32: 40_000}

run = settings(max_examples=60, deadline=None, derandomize=True)
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)
sides = st.sampled_from(["left", "right"])


def mask_of(lengths, side, width):
    position = torch.arange(width)
    rows = [position < n if side == "right" else position >= width - n for n in lengths]
    return torch.stack(rows)


def routing_of(mask, dtype=torch.uint8, layers=3, top_k=2):
    shape = (*mask.shape, layers)
    ids = torch.randint(0, EXPERTS[dtype] - top_k, shape, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([ids + k for k in range(top_k)], -1).masked_fill(~mask[..., None, None], 0)
    return RolloutRouting(ids, mask, tuple(range(layers)), EXPERTS[dtype], 3)


def equal(a, b):
    same = torch.equal(a.expert_ids, b.expert_ids) and torch.equal(a.valid, b.valid)
    return same and (a.layer_ids, a.num_experts, a.rows_valid) == (b.layer_ids, b.num_experts, b.rows_valid)


@run
@given(lengths, sides, st.integers(0, 3), st.sampled_from(list(EXPERTS)), st.integers(1, 4), st.booleans())
def test_packed_rows_unpack_to_the_padded_batch(lengths, side, extra, dtype, multiple_of, one_row):
    mask = mask_of(lengths, side, max(lengths) + extra or 1)
    packing = Packing.from_mask(mask, row_length=None if one_row else max(lengths) + 2, multiple_of=multiple_of)
    whole = routing_of(mask, dtype)
    packed = whole.pack(packing)
    assert packed.expert_ids.dtype == dtype
    assert packed.shape[1] % multiple_of == 0
    assert packed.rows_valid == sum(lengths) == packing.tokens
    assert equal(packed.unpack(packing), whole)
    # Every token sits beside its own position, and nothing else does.
    tokens = torch.arange(mask.numel()).view(mask.shape) + 1
    beside = packing.pack(tokens)
    assert torch.equal((beside > 0), packed.valid | (packing.pack(mask) & ~packed.valid))
    assert torch.equal(packed.expert_ids[beside > 0], whole.expert_ids.flatten(0, 1)[beside[beside > 0] - 1])
    starts = (packing.position_ids() == 0).flatten().nonzero()[:, 0].tolist()
    assert set(packing.cu_seqlens()[:-1].tolist()) <= set(starts)


@run
@given(st.integers(1, 30), st.integers(1, 8), st.sampled_from(list(EXPERTS)))
def test_slices_of_all_ranks_are_the_whole(length, size, dtype):
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.8
    whole = routing_of(valid, dtype)
    slices = [whole.shard(rank, size) for rank in range(size)]
    assert len({part.shape for part in slices}) == 1
    assert slices[0].shape[1] == -(-length // size)
    assert sum(part.rows_valid for part in slices) == whole.rows_valid
    assert equal(RolloutRouting.unshard(slices, length), whole)


@run
@given(lengths, sides, st.integers(1, 4))
def test_slices_of_packed_rows_go_all_the_way_back(lengths, side, size):
    mask = mask_of(lengths, side, max(lengths) + 1)
    whole, packing = routing_of(mask), Packing.from_mask(mask, multiple_of=size)
    packed = whole.pack(packing)
    again = RolloutRouting.unshard([packed.shard(rank, size) for rank in range(size)], packed.shape[1])
    assert equal(again.unpack(packing), whole)


def test_nothing_is_copied_where_nothing_moves():
    full = torch.ones(2, 6, dtype=torch.bool)
    whole = routing_of(full)
    packed = whole.pack(Packing.from_mask(full))
    assert packed.shape[:2] == (1, 12)
    at = whole.expert_ids.data_ptr()
    assert packed.expert_ids.data_ptr() == at
    assert whole.pack(Packing.from_mask(full, row_length=6)).expert_ids.data_ptr() == at
    one = torch.tensor([[False, True, True, False]])
    sample = routing_of(one)
    alone = sample.pack(Packing.from_mask(one))
    assert alone.shape[:2] == (1, 2)
    assert alone.expert_ids.data_ptr() == sample.expert_ids.data_ptr() + sample.expert_ids.stride(1)
    assert whole.shard(1, 2).expert_ids.data_ptr() == at + 3 * whole.expert_ids.stride(1)
    assert whole.pad(6) is whole
    assert RolloutRouting.cat([whole]) is whole


def test_left_padding_moves_tokens_to_the_end():
    whole = routing_of(torch.tensor([[True, True, False]]))
    padded = whole.pad(5, side="left")
    assert padded.valid.tolist() == [[False, False, True, True, False]]
    assert torch.equal(padded.expert_ids[:, 2:], whole.expert_ids)


@pytest.mark.parametrize("mask", [[[1, 1, 0], [0, 1, 1]], [[1, 1, 1], [1, 1, 1]], [[0, 1, 0], [0, 0, 0]]])
def test_gradients_go_back_to_where_tokens_came_from(mask):
    mask = torch.tensor(mask)
    packing = Packing.from_mask(mask, multiple_of=4)
    whole = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, (whole,))
    packed = torch.randn(*packing.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.unpack, (packed,))
    assert torch.equal(packing.unpack(packing.pack(whole)), whole * mask[..., None])
    assert torch.equal(packing.pack(whole).detach(), packing.pack(whole.detach()))


def test_cu_seqlens_that_add_up():
    packing = Packing.from_cu_seqlens([0, 3, 3, 5], 6)
    assert packing.position_ids().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packing.unpack(torch.arange(1, 7)[None]).tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 0]]
    assert packing.cu_seqlens().tolist() == [0, 3, 5, 6]


@pytest.mark.parametrize("bounds", [[1, 3], [0, 4, 2], [0, 3, 8], [0]])
def test_cu_seqlens_that_do_not_add_up_are_refused(bounds):
    with pytest.raises(RoutingError, match="cu_seqlens: expected bounds that rise from 0 to at most the 6"):
        Packing.from_cu_seqlens(bounds, 6)


def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(RoutingError, match=r"sample 1: 2 runs"):
        Packing.from_mask(torch.tensor([[1, 1, 0], [1, 0, 1]]))
    with pytest.raises(RoutingError, match=r"got 2;\s+sample 0: 3 tokens"):
        Packing.from_mask(torch.ones(1, 3), row_length=2)
    packing = Packing.from_mask(torch.ones(2, 3))
    with pytest.raises(RoutingError, match=r"begins with \(2, 3\).*got \(2, 4, 1, 1\)"):
        packing.pack(torch.zeros(2, 4, 1, 1))
    with pytest.raises(RoutingError, match="rank: expected 0 to 1, got 2"):
        shard(torch.zeros(1, 4), 2, 2)
    with pytest.raises(RoutingError, match="2 of one shape with 2 positions, for a length of 4"):
        unshard([torch.zeros(1, 2), torch.zeros(1, 3)], 4)


def test_prefetched_batches_come_in_order(device):
    batches = [routing_of(torch.rand(2, 5) < 0.5) for _ in range(4)]
    moved = list(prefetch(batches, torch.device(device)))
    assert all(equal(a, b.to("cpu")) for a, b in zip(batches, moved, strict=True))
    assert all(b.device.type == torch.device(device).type for b in moved)
