"""Digests of tensors in host memory: in numpy, or compiled by numba where it is installed."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
M1 = 0xBF58476D1CE4E5B9
M2 = 0x94D049BB133111EB
WORD = (1 << 64) - 1
"""Largest word, and the mask that takes an integer modulo 2^64."""
MANY_BYTES = 1 << 28  # from here on a compiled pass is worth its start
_BLOCK_WORDS = 1 << 14  # three buffers of this size, and what is read, stay in a core's cache
_COPIED_BYTES = 1 << 20
_UNROLLED = 4  # words

_Pass = Callable[[np.ndarray, int, int, int], tuple[int, int]]


def read(data: np.ndarray, mask: int, ulp: int, *, many: bool) -> tuple[int, bool]:
    """Sum of the mixed words of uint8 `[N]`, without the length's, and whether any value is not finite.

    Args:
        data: contiguous, at any address.
        mask, ulp: of the lanes in a word; 0, 0 if all values are finite.
        many: use the compiled loop, if numba is installed: the same result, after a second of compilation.
    """
    words_pass = (many and _compiled()) or _blockwise
    total = seen = first = 0
    for words in _words(data):
        part, bits = words_pass(words, first, mask, ulp)
        total, seen, first = total + part, seen | bits, first + len(words)
    # Where the exponent is all ones, and only there, the sum reaches the sign.
    return total & WORD, bool(seen & (mask + ulp))


def _words(data: np.ndarray) -> Iterator[np.ndarray]:
    """uint64 arrays at addresses that are multiples of 8, in order; the last word is padded with zeros."""
    whole_bytes = len(data) // 8 * 8
    if data.ctypes.data % 8 == 0:
        yield data[:whole_bytes].view(np.uint64)
    else:
        for at in range(0, whole_bytes, _COPIED_BYTES):
            yield data[at : min(at + _COPIED_BYTES, whole_bytes)].copy().view(np.uint64)
    if whole_bytes < len(data):
        last = np.zeros(8, np.uint8)
        last[: len(data) - whole_bytes] = data[whole_bytes:]
        yield last.view(np.uint64)


def _blockwise(words: np.ndarray, first: int, mask: int, ulp: int) -> tuple[int, int]:
    size = min(len(words), _BLOCK_WORDS)
    # (i + 1) * GOLDEN of the block's words.
    places = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    places += np.uint64(first * GOLDEN & WORD)
    step = np.uint64(size * GOLDEN & WORD)
    half = np.uint64(32)
    mixed_buffer, spare_buffer = np.empty_like(places), np.empty_like(places)
    total = seen = 0
    for at in range(0, len(words), _BLOCK_WORDS):
        block = words[at : at + _BLOCK_WORDS]
        x, spare = mixed_buffer[: len(block)], spare_buffer[: len(block)]
        np.add(block, places[: len(block)], out=x)
        for factor in (np.uint64(M1), np.uint64(M2)):
            np.right_shift(x, half, out=spare)
            np.bitwise_xor(x, spare, out=x)
            np.multiply(x, factor, out=x)
        np.right_shift(x, half, out=spare)
        np.bitwise_xor(x, spare, out=x)
        total += int(np.add.reduce(x))
        if mask:
            np.bitwise_and(block, np.uint64(mask), out=spare)
            np.add(spare, np.uint64(ulp), out=spare)
            seen |= int(np.bitwise_or.reduce(spare))
        places += step
    return total, seen


@cache
def _compiled() -> _Pass | None:
    """The loop compiled by numba, which releases the GIL: one thread is as fast as memory. None without numba."""
    try:
        import numba
    except ImportError:  # also raised for a numpy that is too new for it
        return None
    word = np.uint64
    golden, m1, m2, half = word(GOLDEN), word(M1), word(M2), word(32)
    step = word(_UNROLLED * GOLDEN & WORD)

    @numba.njit(nogil=True)
    def mixed(x: np.uint64):
        x = (x ^ (x >> half)) * m1
        x = (x ^ (x >> half)) * m2
        return x ^ (x >> half)

    @numba.njit(nogil=True)
    def loop(words: np.ndarray, first: np.uint64, mask: np.uint64, ulp: np.uint64):
        total, seen = word(0), word(0)
        place = first * golden
        together = len(words) // _UNROLLED * _UNROLLED
        # The inner loop makes the distance to `place` a constant: else each word takes a third multiplication.
        for at in range(0, together, _UNROLLED):
            for i in range(_UNROLLED):
                total += mixed(words[at + i] + (place + word(i) * golden))
                seen |= (words[at + i] & mask) + ulp
            place += step
        for at in range(together, len(words)):
            total += mixed(words[at] + place)
            seen |= (words[at] & mask) + ulp
            place += golden
        return total, seen

    def words_pass(words: np.ndarray, first: int, mask: int, ulp: int) -> tuple[int, int]:
        total, seen = loop(words, np.uint64(first + 1), np.uint64(mask), np.uint64(ulp))
        return int(total), int(seen)

    return words_pass
