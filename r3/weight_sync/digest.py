"""A content digest of a tensor, the same on every device."""

import torch
from torch import Tensor

_BLOCK_WORDS = 1 << 22
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # the odd constant of splitmix64, as a signed integer
_MASK = (1 << 64) - 1


def digest(tensor: Tensor) -> int:
    """64-bit digest of the bytes of `tensor`, an integer in [0, 2^64).

    The bytes are read as little-endian 32-bit words w_i (padded with zeros), and the digest is the sum over i of
    (w_i + 1) * m_i modulo 2^64, with multipliers m_i = 2 h(i) + 1 from a multiplicative hash of the position. A change
    of any single word always changes it, because m_i is odd; a change of several, or a swap, goes unseen with a
    probability of about 2^-32. Integer sums do not depend on their order, so all devices agree.
    It guards against faults, not against an adversary.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -flat.numel() % 4
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    words = flat.view(torch.int32)
    total = flat.numel() - padding
    for at in range(0, words.numel(), _BLOCK_WORDS):
        block = words[at : at + _BLOCK_WORDS].to(torch.int64)
        position = torch.arange(at + 1, at + 1 + block.numel(), device=block.device)
        hashed = position * _STEP
        hashed ^= hashed >> 29
        total += int(((block + 1) * (2 * hashed + 1)).sum())
    return total & _MASK


def combine(digests: dict[str, int]) -> int:
    """One digest of many named ones, whatever their order."""
    total = 0
    for name, value in digests.items():
        named = digest(torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8))
        total += (named | 1) * (value + 1)
    return total & _MASK
