"""Digests of tensors in GPU memory: one Triton kernel for all tensors of a chunk.

The kernel can also write what it reads to another place, so that a worker copies and digests in one pass.

Needs Triton; imported only when there is a tensor on CUDA.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3.weight_sync.integrity.digest_cpu import GOLDEN, M1, M2, WORD

PART_TENSORS = 1024  # whose rows are allocated at once
# What one program reads; a multiple of 16, so that a tensor's pieces are aligned as it is. Of 32 KiB, reading takes 11%
# longer on an H200; of 64 KiB, writing as well takes 2% longer there and 1% on an H100.
PIECE_BYTES = {False: 1 << 16, True: 1 << 15}  # by whether it writes
_READ_BYTES = tl.constexpr(PIECE_BYTES[False])
_WRITE_BYTES = tl.constexpr(PIECE_BYTES[True])
_COLUMNS = tl.constexpr(6)
_ROWS = tl.constexpr(8)  # all of a column's are a thread's own, and summed in its registers
_WIDTH = tl.constexpr(256)
_BLOCK = tl.constexpr(_ROWS.value * _WIDTH.value)
_GOLDEN = tl.constexpr(GOLDEN)
_STEP = tl.constexpr(_BLOCK.value * GOLDEN & WORD)
_M1 = tl.constexpr(M1)
_M2 = tl.constexpr(M2)

Read = tuple[Tensor, int, int, int | None, Tensor | None]
"""A contiguous tensor; mask and addend of the lanes in its words; the byte that is NaN, if one is; where it goes."""


class Queue:
    """Digest kernels queued on a device, and their sums. The host waits for none of them.

    Args:
        device: of the tensors.
        beside: queue them on a separate stream, after the work that the current stream already has.
    """

    def __init__(self, device: torch.device, *, beside: bool) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device) if beside else None
        self._parts: list[_Part] = []
        self._streams: dict[int, torch.cuda.Stream] = {}

    def add(self, reads: list[Read]) -> None:
        """Queue the pass over some tensors: one kernel."""
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self._device))
            for tensor, *_ in reads:
                tensor.record_stream(self._beside)
        with torch.cuda.device(self._device), torch.cuda.stream(self._beside):
            if not self._parts or len(self._parts[-1].sums) - self._parts[-1].used < len(reads):
                self._parts.append(_Part(max(len(reads), PART_TENSORS), self._device))
            host, table, sums = self._parts[-1].take(len(reads))
            rows, count, writes = describe(reads)
            if count:
                host.numpy()[:] = rows
                launch(table.copy_(host, non_blocking=True), count, sums, writes=writes)
            for slot, ((tensor, _, _, nan_byte, target), row) in enumerate(zip(reads, rows, strict=True)):
                if nan_byte is not None:
                    sums[slot, 1] += (tensor.view(torch.uint8) == nan_byte).any()
                if target is not None and not row[5]:
                    target.detach().view(tensor.shape).copy_(tensor)
            stream = torch.cuda.current_stream()
            self._streams[stream.cuda_stream] = stream

    def result(self) -> list[list[int]]:
        """For each tensor, in the order of adding: the sum of its mixed words modulo 2^64, without the length's, and a
        number other than 0 if a value is not finite. Waits for the device."""
        for stream in self._streams.values():
            torch.cuda.current_stream(self._device).wait_stream(stream)
        return torch.cat([part.sums[: part.used] for part in self._parts]).tolist()


class _Part:
    """Rows of `describe`, on the host in memory that the device can read by itself, and their sums."""

    def __init__(self, tensors: int, device: torch.device) -> None:
        self._host = torch.empty(tensors, _COLUMNS.value, dtype=torch.int64, pin_memory=True)
        self._device = torch.empty(tensors, _COLUMNS.value, dtype=torch.int64, device=device)
        self.sums = torch.zeros(tensors, 2, dtype=torch.int64, device=device)
        self.used = 0

    def take(self, tensors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for rows on host and device, and for sums, that no queued kernel uses."""
        rows = slice(self.used, self.used + tensors)
        self.used += tensors
        return self._host[rows], self._device[rows], self.sums[rows]


def describe(reads: list[Read]) -> tuple[list[tuple[int, ...]], int, bool]:
    """The kernel's table of tensors, the number of pieces in all, and whether the kernel also writes.

    Returns:
        A row for each: number of the first piece, address, bytes, mask, addend, and the address to write to, or 0. So
        every row is aligned to 16 bytes.
    """
    rows, count = [], 0
    writes = any(target is not None for *_, target in reads)
    piece_bytes = PIECE_BYTES[writes]
    for tensor, mask, ulp, _, target in reads:
        to = target.data_ptr() if target is not None and _in_whole_words(tensor, target) else 0
        rows.append((count, tensor.data_ptr(), tensor.nbytes, mask, ulp, to))
        count += -(-tensor.nbytes // piece_bytes)
    return rows, count, writes


def _in_whole_words(tensor: Tensor, target: Tensor) -> bool:
    """Whether the kernel can write `tensor` to `target`."""
    return not ((tensor.data_ptr() | target.data_ptr()) & 15 or tensor.nbytes & 7)


def launch(table: Tensor, count: int, sums: Tensor, *, writes: bool) -> None:
    """Add the `count` pieces of int64 `[tensors, 6]` to `[tensors, 2]`; both are on the current device, and aligned to
    16 bytes."""
    _compiled(torch.cuda.current_device(), writes)[(count, 1, 1)](table, sums, len(table))


@cache
def _compiled(device: int, writes: bool):
    """The kernel on the current device. `kernel[...]` looks it up by its arguments each time: 62 us in place of 18
    (host of an H100, triton 3.6)."""
    kernel = _write_piece if writes else _read_piece
    return kernel.warmup(torch.int64, torch.int64, 1, grid=(1,), num_warps=4)  # pyrefly: ignore


@triton.jit
def _mixed(words, places):
    x = words + places
    x = (x ^ (x >> 32)) * _M1
    x = (x ^ (x >> 32)) * _M2
    return x ^ (x >> 32)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["tensors"])
def _read_piece(table, sums, tensors):
    _piece(table, sums, tensors, _READ_BYTES, False)  # pyrefly: ignore


@triton.jit(do_not_specialize=["tensors"])
def _write_piece(table, sums, tensors):
    _piece(table, sums, tensors, _WRITE_BYTES, True)  # pyrefly: ignore


@triton.jit
def _piece(table, sums, tensors, piece_bytes: tl.constexpr, writes: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    # The last tensor whose first piece is this one or one before it.
    slot, end = piece * 0, piece * 0 + tensors
    while end - slot > 1:
        middle = (slot + end) // 2
        before = tl.load(table + middle * _COLUMNS) <= piece
        slot = tl.where(before, middle, slot)
        end = tl.where(before, end, middle)
    entry = table + slot * _COLUMNS
    start = (piece - tl.load(entry)) * piece_bytes
    address = tl.load(entry + 1) + start
    size = tl.minimum(tl.load(entry + 2) - start, piece_bytes).to(tl.int32)
    first = (start // 8).to(tl.uint64)  # word of the tensor
    mask = tl.load(entry + 3).to(tl.uint64)
    ulp = tl.load(entry + 4).to(tl.uint64)
    target = tl.load(entry + 5)
    to = tl.multiple_of((target + start).to(tl.pointer_type(tl.uint64)), 16)
    result = sums + slot * 2

    row = tl.arange(0, _ROWS)[:, None] * _WIDTH
    column = tl.arange(0, _WIDTH)
    lane = row + column[None]
    row_places = row.to(tl.uint64) * _GOLDEN
    places = (column.to(tl.uint64) + first + 1) * _GOLDEN  # of the first row
    total = tl.zeros([_WIDTH], tl.uint64)
    seen = tl.zeros([_WIDTH], tl.uint64)

    # Whole blocks of a piece that is aligned to 16 bytes: wide loads without masks. Else none.
    blocks = tl.where((address & 15) == 0, size // (8 * _BLOCK), 0)
    aligned = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
    for block in tl.range(blocks, num_stages=3):
        words = tl.load(aligned + block * _BLOCK + lane)
        if writes:  # noqa: SIM102 (known when it is compiled)
            if target != 0:
                tl.store(to + block * _BLOCK + lane, words)
        total += tl.sum(_mixed(words, places[None] + row_places), 0)
        seen |= tl.reduce((words & mask) + ulp, 0, _either)
        places += _STEP

    # The rest, at any address: a word is put together from the two aligned ones that hold its bytes. An aligned word
    # with a byte of the tensor in it lies wholly in memory that can be read.
    base = ((address >> 3) << 3).to(tl.pointer_type(tl.uint64))
    behind = (address & 7).to(tl.int32)
    count = (size + 7) // 8
    shift = (behind * 8).to(tl.uint64)
    last = (((count * 8) - size) * 8).to(tl.uint64)  # bits of the last word that are not the tensor's
    for start in range(blocks * _BLOCK, count, _BLOCK):
        index = start + lane
        inside = index < count
        low = tl.load(base + index, mask=inside, other=0)
        high = tl.load(base + index + 1, mask=inside & ((index + 1) * 8 < behind + size), other=0)
        words = (low >> shift) | ((high << 1) << (63 - shift))  # two steps, as a shift by 64 is not defined
        if writes:  # noqa: SIM102 (known when it is compiled)
            if target != 0:
                tl.store(to + index, words, mask=inside)  # of whole words: the last one is whole too
        words = tl.where(index == count - 1, (words << last) >> last, words)
        total += tl.sum(tl.where(inside, _mixed(words, places[None] + row_places), 0), 0)
        seen |= tl.reduce((words & mask) + ulp, 0, _either)
        places += _STEP

    tl.atomic_add(result, tl.sum(total).to(tl.int64), sem="relaxed")
    # Where the exponent is all ones, and only there, the sum reaches the sign. All who store here store the same.
    hot = tl.max(((seen & (mask + ulp)) != 0).to(tl.int32))
    tl.store(result + 1, 1, mask=hot != 0)
