"""The wire form of routing: it comes back as it went, and bytes that are not it are refused, within bounded memory."""

import contextlib
import mmap
import random
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERTS, random_ids

from r3 import RolloutRouting, RoutingError
from r3.routing import Packing


def routing(
    shape=(2, 10, 3, 2), experts=EXPERTS, *, seed=0, share=0.8, layer_ids=None, weight_version=None
) -> RolloutRouting:
    b, s, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(experts, (b, s, n, 1), generator=generator)
    ids = (start + torch.arange(k)) % max(experts, 1)
    valid = torch.rand(b, s, generator=generator) < share
    return RolloutRouting(ids, valid, tuple(range(n)) if layer_ids is None else layer_ids, experts, weight_version)


def ragged(samples: int, length: int, layers: int = 48) -> RolloutRouting:
    """As collated rollouts are: right-padded, and without a row of the token that was sampled last."""
    whole = routing((samples, length, layers, 8), 128, share=1.0)
    lengths = torch.arange(samples) % 3 * (length // 4) + length // 2
    return RolloutRouting(whole.expert_ids, torch.arange(length) < lengths[:, None] - 1, whole.layer_ids, 128, 7)


def same(a: RolloutRouting, b: RolloutRouting) -> bool:
    return (
        all(getattr(a, name) == getattr(b, name) for name in ("shape", "layer_ids", "num_experts", "weight_version"))
        and a.expert_ids.dtype == b.expert_ids.dtype
        and torch.equal(a.expert_ids, b.expert_ids)
        and torch.equal(a.valid, b.valid)
    )


def resealed(message: bytes | bytearray, at: int, changed: bytes) -> bytes:
    """The message with other bytes in its header, and checksums that are right: what an attacker would send."""
    made = bytearray(message)
    made[at : at + len(changed)] = changed
    return reseal(made)


def reseal(message: bytearray) -> bytes:
    head = min(struct.unpack_from("<I", message, 12)[0], len(message))
    struct.pack_into("<I", message, 68, zlib.crc32(message[head:]))
    struct.pack_into("<I", message, 16, zlib.crc32(message[20:head], zlib.crc32(message[:16])))
    return bytes(message)


@contextlib.contextmanager
def warning_each_time():
    """torch gives most of its warnings once a process: an earlier test may have had it."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_was_written_is_read(data):
    experts = data.draw(st.sampled_from([1, 2, 8, 128, 256, 257, 512, 32768, 32769, 1 << 20]))
    sizes = st.integers(0, 9)
    shape = (data.draw(sizes), data.draw(sizes), data.draw(sizes), data.draw(st.integers(0, min(experts, 12))))
    layer_ids = data.draw(
        st.lists(st.integers(0, (1 << 32) - 1), min_size=shape[2], max_size=shape[2], unique=True).map(sorted)
    )
    made = routing(
        shape,
        experts,
        seed=data.draw(st.integers(0, 99)),
        share=data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0])),
        layer_ids=tuple(layer_ids),
        weight_version=data.draw(st.none() | st.integers(-(1 << 63), (1 << 63) - 1)),
    )
    compress = data.draw(st.booleans())
    message = made.to_bytes(compress=compress)
    for form in (bytes, bytearray, memoryview):
        assert same(RolloutRouting.from_bytes(form(message)), made)
    at = data.draw(st.integers(0, 9))
    shifted = memoryview(bytes(at) + message)[at:]  # of any alignment
    assert same(RolloutRouting.from_bytes(shifted), made)


@pytest.mark.parametrize("compress", [False, True])
def test_views_in_any_layout_are_written_by_their_content(compress):
    whole = ragged(5, 24, layers=6)
    views = [
        whole.shard(1, 3),
        whole.select(slice(1, 5, 2)),
        whole.select(slice(0, 0)),
        whole.layers((1, 4, 5)),
        whole.pack(Packing.from_mask(whole.valid)),
        whole.pad(30, "left"),
    ]
    assert not views[0].expert_ids.is_contiguous()
    for view in views:
        assert same(RolloutRouting.from_bytes(view.to_bytes(compress=compress)), view)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("length", [128, 4096])
def test_header_and_validity_add_less_than_one_percent_to_the_ids(samples, length):
    made = ragged(samples, length)
    assert len(made.to_bytes()) <= 1.01 * made.expert_ids.nbytes


def test_validity_takes_the_shorter_of_its_two_forms():
    scattered = routing((2, 512, 1, 1), share=0.5)
    runs = RolloutRouting(scattered.expert_ids, torch.arange(512).expand(2, 512) < 100, (0,), EXPERTS)
    stored = [struct.unpack_from("<Q", made.to_bytes(), 52)[0] for made in (scattered, runs)]
    assert stored == [2 * 512 // 8, 4 * 4]
    assert same(RolloutRouting.from_bytes(runs.to_bytes()), runs)


def test_runs_of_scrambled_padding_compress_to_little():
    made = ragged(4, 1024)
    assert len(made.to_bytes(compress=True)) < 0.95 * made.rows_valid * 48 * 8


def test_ids_are_not_copied_and_no_warning_is_given():
    made = routing((2, 8000, 24, 10), 512, share=1.0)
    messages = [made.to_bytes(), memoryview(made.to_bytes()).toreadonly()]
    with warnings.catch_warnings(), warning_each_time():
        warnings.simplefilter("error")
        for message in messages:
            tracemalloc.start()
            read = RolloutRouting.from_bytes(message)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert same(read, made)
            assert peak < 2 << 20 < len(message) / 3
    first = np.frombuffer(messages[1], np.uint8)
    at = read.expert_ids.data_ptr() - first.__array_interface__["data"][0]
    assert 0 < at < len(messages[1])
    del first, message, messages, made
    assert read.expert_ids.sum() > 0  # the memory lives as long as the routing


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("form", ["bytearray", "view", "read-only view", "numpy", "mapped file"])
def test_memory_that_can_be_written_to_is_not_kept(form, compress, tmp_path):
    made = routing(share=0.5)
    message = bytearray(made.to_bytes(compress=compress))
    (tmp_path / "message").write_bytes(message)
    with open(tmp_path / "message", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        owner = mapped if form == "mapped file" else message
        given = {"view": memoryview, "read-only view": lambda m: memoryview(m).toreadonly(), "numpy": np.asarray}
        read = RolloutRouting.from_bytes(given.get(form, lambda m: m)(owner))
        owner[:] = bytes(len(message))
    assert same(read, made)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_each_truncation_and_each_flipped_bit_is_refused(compress, share):
    message = routing((2, 40, 2, 2), weight_version=3, share=share).to_bytes(compress=compress)
    for end in range(len(message)):
        with pytest.raises(RoutingError):
            RolloutRouting.from_bytes(message[:end])
    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RoutingError):
            RolloutRouting.from_bytes(flipped)
    with pytest.raises(RoutingError, match="not one message"):
        RolloutRouting.from_bytes(message + b"\0")


def test_ids_are_checked_even_under_right_checksums():
    made = routing((1, 4, 2, 2), share=1.0)
    message = made.to_bytes()
    at = len(message) - made.expert_ids.nbytes
    with pytest.raises(RoutingError, match=r"position 1, decoder layer 1: \[8, "):
        RolloutRouting.from_bytes(resealed(message, at + 6, b"\x08"))
    with pytest.raises(RoutingError, match=r"position 3, decoder layer 0: \[5, 5\]"):
        RolloutRouting.from_bytes(resealed(message, at + 12, b"\5\5"))
    hidden = RolloutRouting(made.expert_ids, torch.tensor([[True, True, True, False]]), made.layer_ids, EXPERTS)
    with pytest.raises(RoutingError, match="expected ids of 0 in rows that are not valid"):
        RolloutRouting.from_bytes(resealed(hidden.to_bytes(), at + 13, b"\5"))


# Offsets of the header's fields, as in docs/reference/wire-format.md.
@pytest.mark.parametrize(
    ("at", "changed", "message"),
    [
        (0, b"\x93NUMPY\x01\x00", "expected a message that starts with"),
        (8, struct.pack("<H", 3), r"format version 1 to 2, got 3: written by a newer r3; upgrade"),
        (8, struct.pack("<H", 0), "format version 1 to 2, got 0$"),
        (8, struct.pack("<HH", 2, 16), "flags: expected at most 15 in version 2, got 16"),
        (8, struct.pack("<HH", 2, 7), "flags: expected 8 in version 2, got 7"),
        (10, struct.pack("<H", 8), "flags: expected at most 7 in version 1, got 8"),
        (12, struct.pack("<I", 1 << 31), "expected a header within"),
        (12, struct.pack("<I", 79), "header: expected one for 2 layers, got 79 bytes"),
        (20, struct.pack("<I", 2), "ids: expected 56 bytes"),
        (28, struct.pack("<I", 1 << 31), "layers: expected at most 65536"),
        (28, struct.pack("<I", 3), "header: expected one for 3 layers"),
        (32, struct.pack("<I", 3), "ids: expected"),
        (36, struct.pack("<I", 300), "ids: expected 2 bytes each for 300 experts, got 1"),
        (40, struct.pack("<I", 4), "ids: expected 1 bytes each for 8 experts, got 4"),
        (44, struct.pack("<q", 5), "weight version: expected none, got 5"),
        (52, struct.pack("<Q", 1 << 63), "validity: expected 1 bytes"),
        (60, struct.pack("<Q", 1 << 63), "ids: expected 28 bytes"),
        (72, struct.pack("<II", 4, 4), "ascending decoder layers"),
        (80, b"\xff", "zeros after the last row's bit"),
        (81, b"\1", "zeros between validity and ids"),
    ],
)
def test_headers_that_lie_are_refused_even_under_right_checksums(at, changed, message):
    good = routing((1, 7, 2, 2), share=1.0).to_bytes()
    with pytest.raises(RoutingError, match=message):
        RolloutRouting.from_bytes(resealed(good, at, changed))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("at", "values"),
    [
        (20, ((1 << 32) - 1,) * 2),  # rows
        (20, ((1 << 32) - 1, 0)),  # none, but strides
        (20, ((1 << 32) - 1, 1, 0)),  # no ids, but their validity
        (24, ((1 << 31),)),
        (32, ((1 << 32) - 1,)),
    ],
)
def test_huge_declared_sizes_are_refused_without_being_allocated(compress, at, values):
    message = resealed(routing().to_bytes(compress=compress), at, struct.pack(f"<{len(values)}I", *values))
    tracemalloc.start()
    with pytest.raises(RoutingError):
        RolloutRouting.from_bytes(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_empty_shape_whose_strides_overflow_is_refused():
    empty = routing((0, 0, 3, 2)).to_bytes()
    huge = resealed(resealed(empty, 20, b"\xff" * 4), 32, b"\xff" * 4)
    with pytest.raises(RoutingError, match="at most max_bytes"):
        RolloutRouting.from_bytes(huge)


def test_a_bomb_is_not_inflated_beyond_what_its_header_declares():
    made = routing((1, 100, 2, 2), share=0.0)
    message = made.to_bytes(compress=True)
    at = 128  # 80 of the header, two runs, and up to a multiple of 64
    bomb = zlib.compress(bytes(64 << 20), 9)
    changed = bytearray(message[:at] + bomb)
    struct.pack_into("<Q", changed, 60, len(bomb))
    tracemalloc.start()
    with pytest.raises(RoutingError, match="expected 400 bytes of ids after decompression"):
        RolloutRouting.from_bytes(reseal(changed))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("change", [lambda ids: ids + b"more", lambda ids: ids[:-1], lambda ids: ids[:-4]])
def test_compressed_ids_end_where_the_message_says(change):
    """A stream that has all ids may lack its end, or have something after it."""
    made = routing((1, 100, 2, 2), share=1.0)
    message = made.to_bytes(compress=True)
    size = struct.unpack_from("<Q", message, 60)[0]
    ids = change(message[-size:])
    changed = bytearray(message[:-size] + ids)
    struct.pack_into("<Q", changed, 60, len(ids))
    with pytest.raises(RoutingError, match="expected 400 bytes of ids after decompression, got others"):
        RolloutRouting.from_bytes(reseal(changed))


def test_runs_of_validity_are_not_empty():
    """Of equal routing there is one form: the ids of these rows are 0 either way."""
    valid = torch.arange(600)[None] // 100 % 2 == 0
    made = RolloutRouting(torch.zeros(1, 600, 1, 1, dtype=torch.int64), valid, (0,), EXPERTS)
    message = made.to_bytes()
    assert struct.unpack_from("<6I", message, 76) == (100,) * 6
    for runs in ((100, 0, 200, 100, 100, 100), (100, 100, 100, 200, 0, 100), (100, 100, 100, 100, 200, 0)):
        with pytest.raises(RoutingError, match="none empty but the first"):
            RolloutRouting.from_bytes(resealed(message, 76, struct.pack("<6I", *runs)))
    first = resealed(message, 76, struct.pack("<6I", 0, 200, 100, 100, 100, 100))
    assert RolloutRouting.from_bytes(first).rows_valid == 200


def test_a_message_without_a_body_and_one_of_the_most_layers():
    empty = routing((0, 0, 14, 2))
    assert len(empty.to_bytes()) == 128
    assert same(RolloutRouting.from_bytes(empty.to_bytes()), empty)
    deep = routing((1, 1, 1 << 16, 1), share=1.0)
    assert same(RolloutRouting.from_bytes(deep.to_bytes()), deep)


def test_the_caller_bounds_what_is_allocated():
    message = ragged(1, 100).to_bytes(compress=True)
    size = 100 * 48 * 8 + 100
    assert RolloutRouting.from_bytes(message, max_bytes=size).rows_valid == 49
    with pytest.raises(RoutingError, match=f"at most max_bytes = {size - 1}, got {size}") as caught:
        RolloutRouting.from_bytes(message, max_bytes=size - 1)
    assert str(caught.value).endswith("(pass a larger max_bytes if you trust the sender)")


@pytest.mark.parametrize("data", ["text", 5, None, np.zeros((4, 4), np.uint8)[:, ::2], b"", b"\x93R3ROUTE"])
def test_what_is_not_a_message_is_refused(data):
    with pytest.raises(RoutingError, match="from_bytes: expected"):
        RolloutRouting.from_bytes(data)


def test_numbers_that_the_format_cannot_hold_are_refused_when_written():
    with pytest.raises(RoutingError, match="to_bytes: expected"):
        routing(weight_version=1 << 63).to_bytes()
    with pytest.raises(RoutingError, match="to_bytes: expected"):
        routing(layer_ids=(-1, 0, 1)).to_bytes()


def test_mutated_messages_are_refused_or_right():
    """Half of them under right checksums, so that what lies behind those is reached."""
    rng = random.Random(0)
    seeds = [
        routing(shape, experts, share=share, weight_version=version).to_bytes(compress=compress)
        for shape, experts in (((2, 9, 3, 2), 8), ((1, 70, 2, 4), 300), ((3, 4, 1, 1), 40000), ((2, 0, 3, 2), 8))
        for share in (0.5, 1.0)
        for version in (None, 3)
        for compress in (False, True)
    ]
    refused = 0
    for _ in range(24_000):
        message = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(message)) if rng.random() < 0.5 else rng.randrange(min(len(message), 96))
            match rng.randrange(6):
                case 0:
                    message[at] ^= 1 << rng.randrange(8)
                case 1:
                    message[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)))
                case 2:
                    del message[at:]
                case 3:
                    message[at:at] = rng.randbytes(rng.randint(1, 9))
                case 4:
                    del message[at : at + rng.randint(1, 9)]
                case 5:
                    message[at] = rng.randrange(256)
            if not message:
                message = bytearray(1)
        if rng.random() < 0.5 and len(message) >= 80:
            message = bytearray(reseal(message))
        try:
            read = RolloutRouting.from_bytes(message, max_bytes=1 << 20)
        except RoutingError:
            refused += 1
        else:
            # Whatever was accepted is routing that the constructor accepts too, and that is written the same.
            again = RolloutRouting(read.expert_ids, read.valid, read.layer_ids, read.num_experts, read.weight_version)
            assert same(again, read)
            assert same(RolloutRouting.from_bytes(read.to_bytes()), read)
    assert 12_000 < refused < 24_000


def test_random_ids_are_the_real_thing():
    ids = random_ids(2, 30)
    made = RolloutRouting(ids, torch.ones(2, 30, dtype=torch.bool), (0, 1, 2), EXPERTS, 1)
    assert torch.equal(RolloutRouting.from_bytes(made.to_bytes()).expert_ids.long(), ids)
