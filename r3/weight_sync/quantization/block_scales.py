"""FP8 numbers with a scale for each block, as in the checkpoints of DeepSeek-V3 and Qwen3-FP8."""

import torch
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest e4m3 number. Its neighbour is 32 away: half of that, times the scale, bounds the error of a block."""


@torch.no_grad()
def block_quantise(weight: Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`weight` as FP8 numbers `q` and the factor `s` of each block, so that `q * s` is near it.

    s = max |w| / 448 over the block, rounded up to a power of two for UE8M0; q = w / s, rounded to the nearest e4m3
    number, ties to even. In a block of zeros s = 1. So |w - q * s| <= 16 s in a block, and at most half the distance of
    the two e4m3 numbers next to w / s. The formula is that of `act_quant` and `weight_dequant` in DeepSeek-V3's
    `inference/kernel.py`, with a division where others multiply by a rounded reciprocal.

    Args:
        weight: `[..., out, in]`, 16- or 32-bit floating point. Blocks at the edges may be smaller than others.
        block: rows and columns of a block.
        power_of_two: round scales up to powers of two (`scale_fmt: ue8m0`).

    Returns:
        q float8_e4m3fn `[..., out, in]`; s float32 `[..., ceil(out / rows), ceil(in / columns)]`, what checkpoints call
        `weight_scale_inv`. Weights that are not finite give a scale that is not finite.
    """
    rows, columns = weight.shape[-2:]
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    padded = functional.pad(weight.float(), (0, wide * block[1] - columns, 0, high * block[0] - rows))
    blocks = padded.unflatten(-1, (wide, block[1])).unflatten(-3, (high, block[0]))  # [..., high, rows, wide, columns]
    largest = blocks.abs().amax(dim=(-3, -1))
    # By a tensor, so that the bits are the CPU's: CUDA multiplies by the rounded reciprocal of a Python number.
    scale = (largest / torch.full_like(largest, FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    numbers = (blocks / scale[..., :, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    numbers = numbers.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return numbers.to(FP8).contiguous(), scale
