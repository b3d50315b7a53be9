"""Content digests against a plain definition, what they must see, and which values are found not finite."""

import itertools
import random

import pytest
import torch
from digest_cases import DTYPES, cases, places_for, require_written
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3.errors import SyncError
from r3.weight_sync.integrity import digest_cpu
from r3.weight_sync.integrity.digest import ContentDigests, combine, digest

FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["numpy", "compiled"])
def way(request, monkeypatch):
    if request.param == "compiled":
        import numba  # noqa: F401 (without it this would be the other way again)

    monkeypatch.setattr(digest_cpu, "MANY_BYTES", 0 if request.param == "compiled" else 1 << 62)
    return request.param


def plain(data: bytes) -> int:
    """The definition, word by word."""
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)] + [len(data)]
    total = 0
    for place, word in enumerate(words, start=1):
        x = (word + place * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 32)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 32)) * 0x94D049BB133111EB % 2**64
        total += x ^ (x >> 32)
    return total % 2**64


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def not_finite(tensor: torch.Tensor) -> bool:
    digests = ContentDigests()
    digests.add([("x", tensor)])
    return digests.not_finite() == ["x"]


def from_codes(codes: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these bit patterns."""
    raw = b"".join(code.to_bytes(dtype.itemsize, "little") for code in codes)
    return tensor_of(raw).view(dtype)


@pytest.mark.parametrize(
    "length", [*range(18), 4095, 8 * digest_cpu._BLOCK_WORDS, 8 * digest_cpu._BLOCK_WORDS * 2 + 13]
)
def test_it_is_what_its_definition_says(way, length):
    data = random.Random(length).randbytes(length)
    assert digest(tensor_of(data)) == plain(data)


def test_it_never_changes():
    """Both sides of a sync may run different versions of r3."""
    assert digest(torch.arange(100, dtype=torch.uint8)) == 0x6A90CA0E749C5636


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4)], ids=str)
def test_any_dtype_and_shape(way, dtype, shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    data = random.Random(count).randbytes(count)
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = tensor_of(data).view(dtype).reshape(shape)
    assert digest(tensor) == plain(data)
    assert digest(torch.nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point)) == plain(data)


@pytest.mark.parametrize("offset", range(17))
def test_any_address(way, offset):
    data = random.Random(0).randbytes(3 * digest_cpu._COPIED_BYTES // 2)
    assert digest(tensor_of(data)[offset:]) == digest(tensor_of(data[offset:]))
    assert digest(tensor_of(data)[offset : offset + 1001]) == plain(data[offset : offset + 1001])


@pytest.mark.parametrize(
    "view", [lambda x: x.T, lambda x: x[:, 1:], lambda x: x[::2], lambda x: x[0].expand(4, 7), lambda x: x[:, ::3].T]
)
def test_the_order_is_of_the_elements_not_of_the_memory(way, view):
    tensor = view(torch.randn(5, 7, dtype=torch.bfloat16))
    assert digest(tensor) == plain(bytes_of(tensor)) == digest(tensor.clone(memory_format=torch.contiguous_format))


WORDS = st.lists(
    st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1])), min_size=2, max_size=9
)
PROPERTY = settings(deadline=None)


def packed(words: list[int]) -> bytes:
    return b"".join(word.to_bytes(8, "little") for word in words)


@PROPERTY
@given(data=st.binary(min_size=1, max_size=80), where=st.integers(0, 639))
def test_it_sees_a_flipped_bit(data, where):
    flipped = bytearray(data)
    flipped[where // 8 % len(data)] ^= 1 << where % 8
    assert digest(tensor_of(data)) != digest(tensor_of(bytes(flipped)))


@PROPERTY
@given(words=WORDS, bit=st.integers(0, 63), pick=st.randoms())
@example(words=[0, 0], bit=63, pick=random.Random(0))
def test_it_sees_the_same_bit_flipped_in_two_words(words, bit, pick):
    """A sum of words with odd factors, unmixed, never sees two flipped top bits."""
    a, b = pick.sample(range(len(words)), 2)
    flipped = [word ^ (1 << bit) * (at in (a, b)) for at, word in enumerate(words)]
    assert digest(tensor_of(packed(words))) != digest(tensor_of(packed(flipped)))


@PROPERTY
@given(words=WORDS, pick=st.randoms())
def test_it_sees_a_swap(words, pick):
    a, b = pick.sample(range(len(words)), 2)
    swapped = list(words)
    swapped[a], swapped[b] = words[b], words[a]
    assert (digest(tensor_of(packed(words))) == digest(tensor_of(packed(swapped)))) == (words[a] == words[b])


@PROPERTY
@given(data=st.binary(max_size=80), zeros=st.integers(1, 30))
def test_it_sees_the_length(data, zeros):
    lengths = [digest(tensor_of(data + bytes(extra))) for extra in range(zeros + 1)]
    assert len(set(lengths)) == zeros + 1


def test_two_flipped_bits_anywhere_are_seen(way):
    """All pairs of two bits in four words of zeros, of ones, and of a random pattern: no two digests are the same."""
    for start in (0, 2**256 - 1, random.Random(1).getrandbits(256)):
        digests = ContentDigests()
        pairs = list(itertools.combinations(range(0, 256, 3), 2))
        digests.add([(f"{a} {b}", tensor_of((start ^ 1 << a ^ 1 << b).to_bytes(32, "little"))) for a, b in pairs])
        assert len(set(digests.result().values())) == len(pairs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_pattern_is_judged_as_torch_does(way, dtype):
    size = dtype.itemsize
    if size == 1:
        codes = list(range(256))
    else:
        # All signs and exponents, with the fraction's ends: finite ones next to those that are not are among them.
        fraction = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}[dtype]
        ends = [0, 1, 1 << fraction - 1, (1 << fraction) - 1]
        codes = [high << fraction | low for high in range(1 << 8 * size - fraction) for low in ends]
    numbers = from_codes(codes, dtype)
    beside = from_codes([pattern for code in codes for pattern in (0, code, 0)], dtype).reshape(-1, 3)
    digests = ContentDigests()
    digests.add([(f"{code:#x}", numbers[at : at + 1].clone()) for at, code in enumerate(codes)])
    digests.add([(f"{code:#x} beside zeros", beside[at].clone()) for at, code in enumerate(codes)])
    finite = torch.isfinite(numbers.to(torch.float64)).tolist()
    bad = [f"{code:#x}" for code, is_finite in zip(codes, finite, strict=True) if not is_finite]
    assert digests.not_finite() == [*bad, *(f"{name} beside zeros" for name in bad)]
    assert bad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 8, 9, 19])
def test_no_place_is_overlooked_and_no_lane_disturbs_the_next(way, dtype, count):
    """Beside the largest numbers of either sign, at each place, also in the last word's padding."""
    bits = 8 * dtype.itemsize
    numbers = from_codes([code << bits - 8 for code in range(256)] if bits > 8 else list(range(256)), dtype)
    values = numbers.to(torch.float64)
    largest = torch.finfo(dtype).max
    finite = torch.tensor([largest, -largest, 1.0], dtype=torch.float64).to(dtype)
    if dtype == torch.float8_e8m0fnu:
        finite = torch.tensor([largest, 1.0, 2.0], dtype=torch.float64).to(dtype)
    quiet = finite.view(CODES[dtype.itemsize]).repeat(count)[:count]
    assert torch.isfinite(quiet.view(dtype).to(torch.float64)).all()
    assert not not_finite(quiet.view(dtype))
    for bad in numbers.view(CODES[dtype.itemsize])[~torch.isfinite(values)][:2]:
        for place in range(count):
            tensor = quiet.clone()
            tensor[place] = bad
            assert not_finite(tensor.view(dtype)), f"{bad} at {place}"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("bad", [complex(float("nan"), 0), complex(0, float("inf"))])
def test_complex_numbers_too(way, dtype, bad):
    assert not not_finite(torch.zeros(3, dtype=dtype))
    assert not_finite(torch.tensor([0, 0, bad], dtype=dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if not dtype.is_floating_point and not dtype.is_complex])
def test_integers_are_finite(way, dtype):
    assert not not_finite(
        torch.full((64,), 255, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.ones(9) > 0
    )


def test_digests_of_many_come_in_order_and_only_the_bad_are_named(way):
    tensors = {
        "b": torch.randn(40),
        "a": torch.tensor([1.0, float("nan")]),
        "empty": torch.empty(0),
        "c": torch.full((3,), float("inf"), dtype=torch.bfloat16),
    }
    digests = ContentDigests()
    digests.add(list(tensors.items())[:2])
    assert digests.not_finite() == ["a"]
    digests.add(iter(list(tensors.items())[2:]))
    assert digests.result() == {name: digest(tensor) for name, tensor in tensors.items()}
    assert list(digests.result()) == list(tensors)
    assert digests.not_finite() == ["a", "c"]


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ([("here", torch.ones(1))], "here: added twice"),
        ([("x", torch.ones(1)), ("x", torch.ones(1))], "x: added twice"),
        ([("x", torch.ones(1, device="meta"))], "x: expected strided memory on cpu or cuda, got torch.strided, meta"),
        ([("x", torch.ones(2, 2).to_sparse())], "x: expected strided memory on cpu or cuda, got torch.sparse_coo, cpu"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is(chunk, message):
    digests = ContentDigests()
    digests.add([("here", torch.ones(1))])
    with pytest.raises(SyncError, match=message):
        digests.add([("fine", torch.ones(1)), *chunk])
    assert list(digests.result()) == ["here"]


def test_the_combined_digest_is_of_names_and_digests_whatever_their_order():
    one = {"a": 1, "b": 2**63, "c": 5}
    others = [
        {"a": 2**63, "b": 1, "c": 5},
        {"a": 1, "b": 2**63},
        {"a": 1, "b": 2**63, "d": 5},
        {"a": 1 ^ 2**63, "b": 0, "c": 5},
        {"a": 1, "b": 2**63, "c": 5, "": 0},
        {},
    ]
    assert combine(one) == combine(dict(reversed(one.items())))
    assert len({combine(one), *map(combine, others)}) == 1 + len(others)
    assert all(0 <= combine(named) < 2**64 for named in (one, *others))


def test_what_is_read_is_written_where_it_should_be(way):
    chunk = cases("cpu", (0, 3, 8))
    places, memory = places_for(chunk)
    digests, alone = ContentDigests(), ContentDigests()
    digests.add(chunk, places)
    alone.add(chunk)
    assert digests.result() == alone.result()
    require_written(chunk, places, memory)


@pytest.mark.parametrize(
    "place",
    [torch.zeros(5), torch.zeros(6, dtype=torch.int32), torch.zeros(6, device="meta"), torch.zeros(3, 4)[:, 1:3]],
    ids=["elements", "dtype", "device", "gaps"],
)
def test_nothing_is_written_where_it_does_not_fit(place):
    digests, fine = ContentDigests(), torch.zeros(2)
    with pytest.raises(SyncError, match=r"x: expected contiguous memory for 6 elements of torch.float32 on cpu"):
        digests.add([("fine", torch.ones(2)), ("x", torch.ones(2, 3))], {"fine": fine, "x": place})
    assert not fine.any()
    assert digests.result() == {}
