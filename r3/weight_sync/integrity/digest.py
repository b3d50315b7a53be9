"""Content digests of tensors, the same on every device, and which tensors hold NaN or infinity.

The digest of N bytes. They are read as n = ceil(N / 8) little-endian 64-bit words w_i, the last one padded with zeros,
and the length follows as one more word, w_n = N. All arithmetic is modulo 2^64:

    digest = sum over i = 0..n of mix(w_i + (i + 1) * GOLDEN)
    mix(x):  x ^= x >> 32;  x *= M1;  x ^= x >> 32;  x *= M2;  x ^= x >> 32        (logical shifts)

GOLDEN, M1 and M2 are those of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014,
with Stafford's variant 13 of the finaliser of MurmurHash3). Its shifts are 30, 27 and 31; `x ^= x >> 32` costs a GPU,
whose registers have 32 bits, one instruction in place of some four.

What it detects. `mix` is a bijection, so that a change within one aligned word of 8 bytes always changes the digest. A
change of several words, a swap of words, or another length goes unseen with a probability of about 2^-64 if `mix` is
taken for random: it is not, but among 2^44 pairs of random words with one bit flipped in each, none cancelled out. It
guards against faults and not against an adversary, who can compute words that cancel out. Sums do not depend on their
order: any split into chunks, threads and devices gives the same digest.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.integrity import digest_cpu
from r3.weight_sync.integrity.digest_cpu import GOLDEN, M1, M2, WORD


def digest(tensor: Tensor) -> int:
    """64-bit digest of the bytes of `tensor` in C order, an integer in [0, 2^64); blind to dtype and shape.

    Waits for the device. For many tensors, `ContentDigests` waits once.

    Raises:
        SyncError: as `ContentDigests.add`.
    """
    digests = ContentDigests()
    digests.add([("tensor", tensor)])
    return digests.result()["tensor"]


def combine(digests: dict[str, int]) -> int:
    """One 64-bit digest of many named ones, whatever their order: BLAKE2b of names and digests, sorted by name."""
    state = hashlib.blake2b(digest_size=8)
    for name in sorted(digests):
        encoded = name.encode()
        state.update(len(encoded).to_bytes(8, "little") + encoded + digests[name].to_bytes(8, "little"))
    return int.from_bytes(state.digest(), "little")


class ContentDigests:
    """Digests of many named tensors, and which of them are not finite, found in one pass over their bytes.

    Tensors on the CPU are read when they are added. On CUDA the reading is queued: one kernel a chunk, no wait on the
    host. A tensor that is not contiguous is copied first, and one of a dtype whose only NaN is a single byte pattern
    (the `fnuz` ones and float8_e8m0fnu) is read once more by torch.

    Args:
        beside: on CUDA, read on a stream of its own, after what is queued on the current one: what is queued there
            later does not wait for the digests. Tensors may be freed, and must not be written to before `result`.
            Otherwise the current stream reads, and a tensor may be written to again in its order.

    Example:
        >>> digests = ContentDigests()
        >>> digests.add([("a", torch.ones(3)), ("b", torch.tensor([1.0, float("nan")]))])
        >>> digests.result()["a"] == digest(torch.ones(3)), digests.not_finite()
        (True, ['b'])
    """

    def __init__(self, *, beside: bool = False) -> None:
        self._beside = beside
        self._bytes: dict[str, int] = {}  # in the order of adding
        self._total_bytes = 0
        self._sums: dict[str, int] = {}
        self._not_finite: set[str] = set()
        self._queued: dict[torch.device, tuple[list[str], Any]] = {}  # names, and `digest_cuda.Queue`

    def add(self, chunk: Iterable[tuple[str, Tensor]], into: Mapping[str, Tensor] | None = None) -> None:
        """Read the tensors of a chunk. None is read unless all can be.

        Args:
            chunk: names and tensors.
            into: where to write some of them, by name, as they are read: contiguous, on the same device, with as many
                elements of the same dtype.

        Raises:
            SyncError: a name came before; a tensor is neither on the CPU nor on CUDA, or has no plain strided memory;
                it is of a floating dtype whose NaNs are unknown here; it is on CUDA, and there is no Triton; it does
                not fit where it is to be written.
        """
        tensors = list(chunk)
        targets = into or {}
        self.require_readable(tensors)
        _require_fits(tensors, targets)
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            by_device.setdefault(tensor.device, []).append((name, tensor.detach()))
        # Of all that was added so far: a second of compilation pays off after some bytes, in however many tensors.
        self._total_bytes += sum(tensor.nbytes for _, tensor in tensors)
        for device, part in by_device.items():
            if device.type == "cpu":
                self._read(part, targets)
                continue
            if device not in self._queued:
                self._queued[device] = ([], _cuda().Queue(device, beside=self._beside))
            names, queue = self._queued[device]
            queue.add([(tensor.contiguous(), *_lanes(tensor.dtype), targets.get(name)) for name, tensor in part])
            names += [name for name, _ in part]
        self._bytes |= {name: tensor.nbytes for name, tensor in tensors}

    def _read(self, part: list[tuple[str, Tensor]], targets: Mapping[str, Tensor]) -> None:
        many = self._total_bytes >= digest_cpu.MANY_BYTES
        for name, tensor in part:
            mask, ulp, nan_byte = _lanes(tensor.dtype)
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            self._sums[name], not_finite = digest_cpu.read(data, mask, ulp, many=many)
            if not_finite or (nan_byte is not None and bool((data == nan_byte).any())):
                self._not_finite.add(name)
            if name in targets:
                targets[name].detach().view(tensor.shape).copy_(tensor)

    def __contains__(self, name: str) -> bool:
        return name in self._bytes

    def result(self) -> dict[str, int]:
        """Digest of each tensor by name, in the order of adding. Waits for what is queued, once a device."""
        self._collect()
        return {name: (self._sums[name] + _of_length(size)) & WORD for name, size in self._bytes.items()}

    def not_finite(self) -> list[str]:
        """Names of the floating and complex tensors that hold NaN or, where the dtype has one, infinity. Waits too."""
        self._collect()
        return [name for name in self._bytes if name in self._not_finite]

    def _collect(self) -> None:
        for names, queue in self._queued.values():
            for name, (total, not_finite) in zip(names, queue.result(), strict=True):
                self._sums[name] = total
                if not_finite:
                    self._not_finite.add(name)
        self._queued = {}

    def require_readable(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Raise the error that `add` would raise for these tensors."""
        problems = []
        names: set[str] = set()
        for name, tensor in tensors:
            if name in self._bytes or name in names:
                problems.append(f"{name}: added twice")
            names.add(name)
            if tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
                problems.append(f"{name}: expected strided memory on cpu or cuda, got {tensor.layout}, {tensor.device}")
            elif tensor.dtype.is_floating_point and tensor.dtype not in _KNOWN:
                problems.append(f"{name}: which values of {tensor.dtype} are NaN is not known; send its bytes as uint8")
        if problems:
            raise SyncError(f"cannot take the digest of {len(problems)} tensors:{summary(problems)}")
        if any(tensor.is_cuda for _, tensor in tensors):
            _cuda()


def _require_fits(tensors: list[tuple[str, Tensor]], targets: Mapping[str, Tensor]) -> None:
    problems = []
    for name, tensor in tensors if targets else ():
        target = targets.get(name)
        if target is None:
            continue
        expected = (tensor.numel(), tensor.dtype, tensor.device)
        if (target.numel(), target.dtype, target.device) != expected or not target.is_contiguous():
            problems.append(
                f"{name}: expected contiguous memory for {tensor.numel()} elements of {tensor.dtype} on "
                f"{tensor.device}, got {tuple(target.shape)} of {target.dtype} on {target.device}"
            )
    if problems:
        raise SyncError(f"{len(problems)} tensors cannot be written where they should:{summary(problems)}")


def mix(x: int) -> int:
    """The bijection of 64-bit words that is summed; `x` is taken modulo 2^64."""
    x &= WORD
    for factor in (M1, M2):
        x = ((x ^ x >> 32) * factor) & WORD
    return x ^ x >> 32


@cache
def _of_length(size: int) -> int:
    """The term of the last word, the length in bytes."""
    return mix(size + ((size + 7) // 8 + 1) * GOLDEN)


@cache
def _lanes(dtype: torch.dtype) -> tuple[int, int, int | None]:
    """How to detect NaN and infinity: mask and addend for 64-bit words, or the byte that is NaN.

    A number is NaN or infinite if its exponent is all ones (float8_e4m3fn: NaN if all bits but the sign are). Then the
    exponent, and one in its last place, add up to the bit of the sign, and at most to that: lanes do not meet.
    """
    if dtype not in _EXPONENTS:
        return 0, 0, _NAN_BYTE.get(dtype)
    lane_bytes, exponent = _EXPONENTS[dtype]
    lanes = WORD // ((1 << 8 * lane_bytes) - 1)  # one in the last place of every lane
    return exponent * lanes, (exponent & -exponent) * lanes, None


def _cuda():
    """The module of the CUDA kernel, whose import needs Triton."""
    try:
        from r3.weight_sync.integrity import digest_cuda
    except ImportError as error:
        raise SyncError(
            f"digests of CUDA tensors need Triton, which cannot be imported ({error}): install the `triton` that "
            "belongs to this build of torch"
        ) from error
    return digest_cuda


def _known(**values):
    """The dtypes of these names that this version of torch has."""
    return {getattr(torch, name): value for name, value in values.items() if hasattr(torch, name)}


# Bytes of a number, and the bits that are all ones in NaN and infinity.
_EXPONENTS: dict[torch.dtype, tuple[int, int]] = _known(
    bfloat16=(2, 0x7F80),
    float16=(2, 0x7C00),
    float32=(4, 0x7F800000),
    float64=(8, 0x7FF0000000000000),
    complex32=(2, 0x7C00),
    complex64=(4, 0x7F800000),
    complex128=(8, 0x7FF0000000000000),
    float8_e4m3fn=(1, 0x7F),  # has no infinity
    float8_e5m2=(1, 0x7C),
)
_NAN_BYTE: dict[torch.dtype, int] = _known(float8_e4m3fnuz=0x80, float8_e5m2fnuz=0x80, float8_e8m0fnu=0xFF)
_KNOWN = {*_EXPONENTS, *_NAN_BYTE, *_known(float4_e2m1fn_x2="has neither")}
