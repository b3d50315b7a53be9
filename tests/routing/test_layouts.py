"""Padded, packed and sliced routing: each layout and its way back."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from r3 import RolloutRouting, RoutingError
from r3.errors import SHOWN
from r3.routing import Packing, pad, prefetch, shard, unshard
from r3.routing.layout import Place

EXPERTS = {torch.uint8: 200, torch.int16: 1000, torch.int32: 40_000}

run = settings(max_examples=60, deadline=None, derandomize=True)
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)
sides = st.sampled_from(["left", "right", "both"])
dtypes = st.sampled_from(list(EXPERTS))


def mask_of(lengths, side, width):
    position = torch.arange(width)
    starts = [{"right": 0, "left": width - n, "both": (width - n) // 2}[side] for n in lengths]
    return torch.stack([(position >= at) & (position < at + n) for at, n in zip(starts, lengths, strict=True)])


def routing_of(mask, dtype=torch.uint8, layers=3, top_k=2, version=3):
    shape = (*mask.shape, layers)
    ids = torch.randint(0, EXPERTS[dtype] - top_k, shape, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([ids + k for k in range(top_k)], -1).masked_fill(~mask[..., None, None], 0)
    return RolloutRouting(ids, mask, tuple(range(layers)), EXPERTS[dtype], version)


def facts(routing):
    return routing.layer_ids, routing.num_experts, routing.weight_version, routing.rows_valid, routing.expert_ids.dtype


def equal(a, b):
    return torch.equal(a.expert_ids, b.expert_ids) and torch.equal(a.valid, b.valid) and facts(a) == facts(b)


@run
@given(lengths, sides, st.integers(0, 3), dtypes, st.integers(1, 4), st.booleans())
def test_packed_rows_unpack_to_the_padded_batch(lengths, side, extra, dtype, multiple_of, one_row):
    mask = mask_of(lengths, side, max(lengths) + extra or 1)
    packing = Packing.from_mask(mask, row_length=None if one_row else max(lengths) + 2, multiple_of=multiple_of)
    whole = routing_of(mask, dtype)
    packed = whole.pack(packing)
    assert packing.lengths == tuple(lengths)
    assert packed.shape[:2] == packing.shape
    assert packed.shape[1] % multiple_of == 0
    assert packed.expert_ids.dtype == dtype
    assert packed.rows_valid == sum(lengths) == packing.tokens
    assert equal(packed.unpack(packing), whole)
    # Each token's own number goes with it: row and number tell where the token is, and from where.
    number = packing.pack(torch.arange(mask.numel()).view(mask.shape) + 1)
    assert torch.equal(number > 0, packed.valid)
    assert torch.equal(packed.expert_ids[number > 0], whole.expert_ids.flatten(0, 1)[number[number > 0] - 1])
    # A sequence lies in one piece; its positions count from 0.
    positions, bounds = packing.position_ids(), packing.cu_seqlens().tolist()
    found = []
    for begin, end in pairwise(bounds):
        assert begin // packing.shape[1] == (end - 1) // packing.shape[1]
        numbers = number.flatten()[begin:end]
        if numbers.any():
            assert torch.equal(numbers, numbers[0] + torch.arange(end - begin))
            assert positions.flatten()[begin:end].tolist() == list(range(end - begin))
            found.append(int(numbers[0] - 1) // mask.shape[1])
        else:
            assert not positions.flatten()[begin:end].any()
    assert sorted(found) == [b for b, n in enumerate(lengths) if n]


@run
@given(lengths.filter(any), st.integers(1, 4))
def test_bounds_give_the_packing_that_the_mask_gives(lengths, multiple_of):
    packing = Packing.from_mask(mask_of(lengths, "right", max(lengths)), multiple_of=multiple_of)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert Packing.from_cu_seqlens(bounds, sum(lengths), multiple_of=multiple_of) == packing
    assert Packing.from_cu_seqlens(bounds.tolist(), sum(lengths), multiple_of=multiple_of) == packing


@run
@given(st.integers(1, 30), st.integers(1, 8), dtypes)
def test_slices_of_all_ranks_are_the_whole(length, size, dtype):
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.8
    whole = routing_of(valid, dtype)
    slices = [whole.shard(rank, size) for rank in range(size)]
    assert {part.shape[:2] for part in slices} == {(2, -(-length // size))}
    assert sum(part.rows_valid for part in slices) == whole.rows_valid
    assert equal(RolloutRouting.unshard(slices, length), whole)


@run
@given(lengths, sides, st.integers(1, 8))
def test_slices_of_packed_rows_go_all_the_way_back(lengths, side, size):
    mask = mask_of(lengths, side, max(lengths) + 1)
    whole, packing = routing_of(mask), Packing.from_mask(mask)
    packed = whole.pack(packing)
    again = RolloutRouting.unshard([packed.shard(rank, size) for rank in range(size)], packed.shape[1])
    assert equal(again.unpack(packing), whole)


@run
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 3), dtypes)
def test_parts_lie_one_after_the_other_in_the_batch(shapes, extra, dtype):
    parts = [routing_of(torch.rand(shape) < 0.8, dtype) for shape in shapes]
    length = max(s for _, s in shapes) + extra
    made = RolloutRouting.cat(parts, length=length)
    assert made.shape[:2] == (sum(b for b, _ in shapes), length)
    assert made.rows_valid == sum(part.rows_valid for part in parts)
    at = 0
    for part in parts:
        b, s = part.shape[:2]
        assert torch.equal(made.expert_ids[at : at + b, :s], part.expert_ids)
        assert torch.equal(made.valid[at : at + b, :s], part.valid)
        assert not made.expert_ids[at : at + b, s:].any()
        assert not made.valid[at : at + b, s:].any()
        at += b


class Allocations(TorchDispatchMode):
    """Bytes of all memory that operators took."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):  # kept, so that no memory is used twice
            self.storages[made.untyped_storage().data_ptr()] = made.untyped_storage()
        return made

    def taken(self, *given):
        known = {tensor.untyped_storage().data_ptr() for part in given for tensor in (part.expert_ids, part.valid)}
        return sum(storage.nbytes() for at, storage in self.storages.items() if at not in known)


def test_each_way_takes_memory_for_its_result_alone():
    mask = mask_of([50, 80, 0, 65], "right", 90)
    packing, whole = Packing.from_mask(mask, multiple_of=8), routing_of(mask, layers=12, top_k=8)
    packed = whole.pack(packing)
    parts = [routing_of(torch.ones(1, n, dtype=torch.bool), layers=12, top_k=8) for n in (50, 80, 1, 65)]
    ways = {
        "cat": (lambda: RolloutRouting.cat(parts, length=90), parts),
        "pack": (lambda: whole.pack(packing), [whole]),
        "unpack": (lambda: packed.unpack(packing), [packed]),
        "pad": (lambda: whole.pad(100), [whole]),
    }
    for name, (way, sources) in ways.items():
        with Allocations() as allocations:
            made = way()
        result = made.expert_ids.nbytes + made.valid.nbytes
        assert result <= allocations.taken(*sources) <= 1.1 * result, name


def test_nothing_is_copied_where_nothing_moves():
    full = torch.ones(2, 6, dtype=torch.bool)
    whole = routing_of(full)
    packed = whole.pack(Packing.from_mask(full))
    assert packed.shape[:2] == (1, 12)
    at = whole.expert_ids.data_ptr()
    assert packed.expert_ids.data_ptr() == at
    assert packed.unpack(Packing.from_mask(full)).expert_ids.data_ptr() == at
    assert whole.pack(Packing.from_mask(full, row_length=6)).expert_ids.data_ptr() == at
    one = torch.tensor([[False, True, True, False]])
    sample = routing_of(one)
    alone = sample.pack(Packing.from_mask(one))
    assert alone.shape[:2] == (1, 2)
    assert alone.expert_ids.data_ptr() == sample.expert_ids.data_ptr() + sample.expert_ids.stride(1)
    assert whole.shard(1, 2).expert_ids.data_ptr() == at + 3 * whole.expert_ids.stride(1)
    assert whole.shard(0, 4).expert_ids.data_ptr() == at
    assert whole.pad(6) is whole
    assert RolloutRouting.cat([whole]) is whole
    assert RolloutRouting.unshard([whole], 6).expert_ids.data_ptr() == at


def test_sequences_go_to_the_first_row_that_has_room():
    packing = Packing.from_mask(mask_of([3, 2, 3, 1, 2], "right", 3), row_length=4, multiple_of=3)
    assert [(place.row, place.offset) for place in packing.places] == [(0, 0), (1, 0), (2, 0), (0, 3), (1, 2)]
    assert packing.shape == (3, 6)
    assert packing.position_ids().tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert packing.cu_seqlens().tolist() == [0, 3, 4, 6, 8, 10, 12, 15, 18]


def test_rows_are_as_long_as_their_tokens_unless_asked_otherwise():
    mask = mask_of([3], "right", 5)
    assert Packing.from_mask(mask).shape == Packing.from_cu_seqlens([0, 3], 3).shape == (1, 3)
    for width, samples in ((0, 2), (5, 0)):
        empty = Packing.from_mask(torch.zeros(samples, width, dtype=torch.bool))
        assert (empty.shape, empty.lengths, empty.batch_shape) == ((1, 1), (0,) * samples, (samples, width))
        assert empty.position_ids().tolist() == [[0]]
    assert Packing.from_mask(mask).position_ids().dtype == torch.int64


def test_bounds_may_be_a_tensor():
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    assert repr(Packing.from_cu_seqlens(bounds, 5)) == repr(Packing.from_cu_seqlens([0, 3, 5], 5))


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ([0, 3, 2], "[0, 3, 2]"),
        (list(range(1, SHOWN + 1)), f"[{', '.join(map(str, range(1, SHOWN + 1)))}]"),
        (list(range(1, SHOWN + 4)), f"[{', '.join(map(str, range(1, SHOWN + 1)))}, ... {SHOWN + 3}]"),
    ],
)
def test_bounds_that_do_not_add_up_are_shown(bounds, shown):
    with pytest.raises(RoutingError) as caught:
        Packing.from_cu_seqlens(bounds, 9)
    assert f"rise from 0 to the 9 tokens of the row, got {shown}. Padding" in str(caught.value)


def test_positions_of_a_batch_have_three_parts():
    packing = Packing.from_mask(mask_of([3, 2], "right", 3))
    for shape in ((3, 2), (2, 2, 3), (4, 2, 3), (3, 2, 3, 1)):
        with pytest.raises(RoutingError, match=r"multimodal: expected positions \[3, B, S\]"):
            packing.position_ids(multimodal=torch.zeros(shape, dtype=torch.int64))


def test_sequences_may_lie_in_any_order():
    turned = Packing((Place(0, 0, 2, 0, 2), Place(1, 0, 2, 0, 0)), batch_shape=(2, 2), shape=(1, 4))
    packed = turned.pack(torch.tensor([[1, 2], [3, 4]]))
    assert packed.tolist() == [[3, 4, 1, 2]]
    assert turned.unpack(packed).tolist() == [[1, 2], [3, 4]]
    spare = Packing((Place(0, 0, 2, 0, 0),), batch_shape=(1, 2), shape=(2, 2))
    assert spare.unpack(torch.tensor([[1, 2], [0, 0]])).tolist() == [[1, 2]]


def test_padding_is_filled_with_what_is_asked_for():
    tensor = torch.arange(1, 7).view(2, 3)
    packing = Packing.from_mask(torch.tensor([[1, 1, 0], [0, 1, 0]]), multiple_of=4)
    assert packing.pack(tensor, fill=-1).tolist() == [[1, 2, 5, -1]]
    assert packing.unpack(torch.tensor([[1, 2, 3, 4]]), fill=-1).tolist() == [[1, 2, -1], [-1, 3, -1]]
    assert shard(tensor, 1, 2, fill=-1).tolist() == [[3, -1], [6, -1]]
    assert shard(tensor, 1, 2, dim=0).tolist() == [[4, 5, 6]]
    assert unshard([tensor, tensor], 3, dim=0).tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    assert pad(tensor, 4, left=True, fill=-1).tolist() == [[-1, 1, 2, 3], [-1, 4, 5, 6]]


def test_padding_that_the_dtype_does_not_hold_is_refused():
    packing = Packing.from_mask(torch.tensor([[1, 1, 0], [0, 1, 0]]), multiple_of=4)
    for dtype in (torch.uint8, torch.uint16):
        tensor = torch.ones(2, 3).to(dtype)
        for way in (lambda t: pad(t, 4, fill=-1), lambda t: packing.pack(t, -1), lambda t: shard(t, 1, 2, fill=-1)):
            with pytest.raises(RoutingError, match=r"fill: expected a value of torch\.uint"):
                way(tensor)  # 255 would be an expert


def test_left_padding_moves_tokens_to_the_end():
    whole = routing_of(torch.tensor([[True, True, False]]))
    padded = whole.pad(5, side="left")
    assert padded.valid.tolist() == [[False, False, True, True, False]]
    assert torch.equal(padded.expert_ids[:, 2:], whole.expert_ids)


def test_slices_of_several_versions_have_none():
    a, b = (routing_of(torch.ones(1, 4, dtype=torch.bool), version=version) for version in (3, 4))
    assert RolloutRouting.unshard([a, a], 8).weight_version == RolloutRouting.cat([a, a]).weight_version == 3
    assert RolloutRouting.unshard([a, b], 8).weight_version is RolloutRouting.cat([a, b]).weight_version is None


@pytest.mark.parametrize("mask", [[[1, 1, 0], [0, 1, 1]], [[1, 1, 1], [1, 1, 1]], [[0, 1, 0], [0, 0, 0]]])
@pytest.mark.parametrize("row_length", [None, 3])
def test_gradients_go_back_to_where_tokens_came_from(mask, row_length):
    mask = torch.tensor(mask)
    packing = Packing.from_mask(mask, row_length=row_length, multiple_of=4)
    whole = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(*packing.shape, dtype=torch.float64, requires_grad=True)
    for way, tensor in [(packing.pack, whole), (packing.unpack, packed)]:
        assert torch.autograd.gradcheck(way, (tensor,))
        assert torch.autograd.gradgradcheck(way, (tensor,))
    (gradient,) = torch.autograd.grad(packing.pack(whole).sum(), whole)
    assert torch.equal(gradient, mask[..., None].expand_as(gradient).double())
    assert torch.equal(packing.unpack(packing.pack(whole)), whole * mask[..., None])


def test_gradients_of_slices_skip_the_padding():
    whole = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)

    def there_and_back(tensor):
        return unshard([shard(tensor, rank, 3, fill=7) for rank in range(3)], 5)

    assert torch.autograd.gradcheck(there_and_back, (whole,))


def test_cu_seqlens_that_add_up():
    packing = Packing.from_cu_seqlens([0, 3, 3, 5], 5, multiple_of=3)
    assert packing.position_ids().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packing.unpack(torch.arange(1, 7)[None]).tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 0]]
    assert packing.cu_seqlens().tolist() == [0, 3, 5, 6]
    assert packing.cu_seqlens().dtype == torch.int32


@pytest.mark.parametrize("bounds", [[1, 3, 6], [0, 4, 2, 6], [0, 3, 8], [0, 3, 5], [0], []])
def test_cu_seqlens_that_do_not_add_up_are_refused(bounds):
    with pytest.raises(RoutingError, match=r"cu_seqlens: expected bounds that rise from 0 to the 6 tokens.*got \["):
        Packing.from_cu_seqlens(bounds, 6)


WHOLE = routing_of(torch.ones(2, 6, dtype=torch.bool))
OTHER = routing_of(torch.ones(2, 6, dtype=torch.bool), torch.int16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Packing.from_mask(torch.tensor([[1, 1, 0], [1, 0, 1]])), r"one run.*\n  sample 1: 2 runs"),
        (lambda: Packing.from_mask(torch.ones(3).int()), r"\[B, S\], true on tokens, got torch.int32 \(3,\)"),
        (lambda: Packing.from_mask(torch.zeros(2, 3)), "bool or integer.*got torch.float32"),
        (lambda: Packing.from_mask(torch.ones(1, 3).int(), row_length=2), r"got 2\. Raise it.*\n  sample 0: 3 tokens"),
        (lambda: Packing.from_mask(torch.ones(1, 3).int(), multiple_of=0), "multiple_of: expected 1 or more, got 0"),
        (lambda: WHOLE.pack(Packing.from_mask(torch.ones(2, 5).int())), r"with \(2, 5\), got \(2, 6, 3, 2\)"),
        (lambda: WHOLE.unpack(Packing.from_mask(torch.ones(2, 5).int())), r"with \(1, 10\), got \(2, 6, 3, 2\)"),
        (lambda: WHOLE.shard(2, 2), "rank: expected 0 to 1, got 2 of 2 ranks"),
        (lambda: WHOLE.shard(-1, 2), "rank: expected 0 to 1, got -1"),
        (lambda: RolloutRouting.unshard([WHOLE, WHOLE.pad(7)], 12), r"6 positions \(length 12 over 2.*\n.*1: \(2, 7"),
        (lambda: RolloutRouting.unshard([WHOLE, WHOLE], 10), r"5 positions \(length 10 over 2 ranks\)"),
        (lambda: RolloutRouting.unshard([], 10), "parts: expected at least one"),
        (lambda: RolloutRouting.cat([WHOLE, OTHER]), r"one \(layer_ids, K, num_experts, device\)(.|\n)*2, 1000"),
        (lambda: unshard([], 10), "over 0 ranks"),
        (lambda: WHOLE.pad(5), "length: expected at least the 6 positions there are, got 5"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(call, message):
    with pytest.raises(RoutingError, match=rf"(?s){message}"):
        call()


def test_prefetched_batches_come_in_order(device):
    batches = [routing_of(torch.rand(2, 5) < 0.5) for _ in range(4)]
    moved = list(prefetch(batches, device))
    assert all(equal(a, b.to("cpu")) for a, b in zip(batches, moved, strict=True))
    assert all(b.device.type == torch.device(device).type for b in moved)
    assert list(prefetch([], device)) == []


@pytest.mark.gpu
def test_prefetched_batches_are_whole_when_read_and_while_they_are_read():
    batches = [torch.full((1 << 26,), i, dtype=torch.uint8) for i in range(6)]
    for sources in (batches, [batch.pin_memory() for batch in batches]):
        for asleep in (0, 20_000_000):  # cycles: the GPU is behind the host, or not
            reads = []
            for batch in prefetch(sources, "cuda"):
                torch.cuda._sleep(asleep)
                reads.append(torch.stack([batch.amin(), batch.amax()]))
                del batch  # its memory may go to the next one before the read above has run
            assert torch.stack(reads).tolist() == [[i, i] for i in range(6)]


@pytest.mark.gpu
def test_loops_share_the_memory_that_they_copy_to():
    batches = [torch.zeros(1 << 24, dtype=torch.uint8).pin_memory() for _ in range(4)]
    reserved = []
    for _ in range(5):
        for batch in prefetch(batches, "cuda"):
            batch.sum()
        del batch
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[0]


@pytest.mark.gpu
def test_the_host_does_not_wait_for_layouts_of_a_gpu():
    mask = mask_of([3, 5, 0], "right", 6)
    packing, whole = Packing.from_mask(mask), routing_of(mask).pin_memory().to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = whole.pack(packing)
        again = RolloutRouting.unshard([packed.shard(rank, 3) for rank in range(3)], packed.shape[1]).unpack(packing)
        joined = RolloutRouting.cat([again, whole.select(slice(0, 1)).pad(9, side="left")])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(again.to("cpu"), routing_of(mask))
    assert joined.rows_valid == 11


@pytest.mark.gpu
def test_collation_into_page_locked_memory():
    made = RolloutRouting.cat([WHOLE, WHOLE], length=9, pin_memory=True)
    assert made.expert_ids.is_pinned()
    assert made.pin_memory().expert_ids.data_ptr() == made.expert_ids.data_ptr()
    assert made.select(slice(1, 3)).pin_memory().expert_ids.data_ptr() == made.expert_ids[1:].data_ptr()
    assert equal(made, RolloutRouting.cat([WHOLE, WHOLE], length=9))
