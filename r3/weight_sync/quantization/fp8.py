"""Quantises weights of a 16- or 32-bit trainer for an engine that holds them in FP8, with a scale per block.

sync.push(quantised(named_weights(model), engine_config), version=1)
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.quantization.block_scales import FP8, block_quantise
from r3.weight_sync.quantization.scheme import SCALE, Fp8Scheme, fp8_scheme
from r3.weight_sync.weights.gathering import placeholder
from r3.weight_sync.weights.lazy import LazyWeight, SharedMaterialization, Weight, as_source, gathered

__all__ = ["Fp8Scheme", "block_quantise", "fp8_scheme", "quantised"]

_AT_ONCE = 1 << 26


def quantised(
    named: Iterable[tuple[str, Weight]], config: Any, *, checkpoint: str | Path | None = None
) -> list[tuple[str, LazyWeight]]:
    """The weights in the form of the engine's FP8 checkpoint: quantised ones as `X.weight` and `X.weight_scale_inv`.

    Each is quantised when its turn comes, on the device where it is made. Fused experts (`fused_experts=True`) are
    quantised all at once, which is faster, and sent apart under the names of the checkpoint: vLLM 0.26 turns the scales
    of fused ones by mistake. Experts that are not quantised stay fused.

    Args:
        named: checkpoint names and weights, as `named_weights` gives them.
        config: Hugging Face configuration of the engine's model, or its `quantization_config`: `quant_method: fp8`,
            `weight_block_size`, `ignored_layers` or `modules_to_not_convert`, `scale_fmt`.
        checkpoint: folder from which the engine was started. With it, exactly those weights are quantised that have a
            scale there; without it, those that vLLM's rules say, from names.

    Raises:
        SyncError: another quantisation; a weight that the checkpoint holds in FP8 is missing; experts that checkpoints
            of this family hold in one tensor (gpt-oss, Llama 4, Qwen3-VL).

    Example:
        >>> named = [("model.layers.0.mlp.down_proj.weight", torch.ones(4, 8))]
        >>> scheme = {"quant_method": "fp8", "weight_block_size": [2, 4]}
        >>> [tuple(weight.shape) for _, weight in quantised(named, scheme)]  # the matrix, and a scale for each block
        [(4, 8), (2, 2)]
    """
    scheme = fp8_scheme(config, checkpoint)
    weights = [(name, as_source(name, weight)) for name, weight in named]
    if scheme.held is not None:
        there = {part for name, weight in weights for part in weight.parts or (name,)}
        lost = sorted(scheme.held - there)
        if lost:
            raise SyncError(f"weights that the checkpoint holds in FP8 are missing:{summary(lost)}")
    sent: list[tuple[str, LazyWeight]] = []
    for name, weight in weights:
        parts = weight.parts or (name,)
        rows = math.prod(weight.shape[:-1]) // len(parts)
        part_shape = torch.Size([rows, weight.shape[-1]]) if weight.parts else weight.shape
        if scheme.holds(parts[0], part_shape):
            sent += _quantised(parts, part_shape, weight, scheme)
        else:
            sent.append((name, weight))
    return sent


def _quantised(
    parts: tuple[str, ...], shape: torch.Size, weight: LazyWeight, scheme: Fp8Scheme
) -> list[tuple[str, LazyWeight]]:
    """The matrices `parts`, each of `shape`, which are stored one after the other in `weight`, and their scales."""
    if len(shape) != 2 or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise SyncError(f"{weight.name}: expected a matrix of 16- or 32-bit numbers, got {tuple(shape)} {weight.dtype}")
    grid = torch.Size([-(-shape[0] // scheme.block[0]), -(-shape[1] // scheme.block[1])])

    def make() -> list[Tensor]:
        tensors: list[Tensor] = []
        full = gathered(weight)
        if full.is_meta:  # another rank keeps it, and quantises
            return [placeholder(shape, FP8), placeholder(grid, torch.float32)] * len(parts)
        # In float32, and with what is in between, a matrix takes many times its room: not all experts at once.
        for matrices in full.reshape(-1, *shape).split(max(1, _AT_ONCE // shape.numel())):
            numbers, scales = block_quantise(matrices, scheme.block, power_of_two=scheme.power_of_two)
            tensors += [tensor for pair in zip(numbers, scales, strict=True) for tensor in pair]
        return tensors

    together = SharedMaterialization(make)

    def source(index: int, name: str, shape: torch.Size, dtype: torch.dtype) -> tuple[str, LazyWeight]:
        take = lambda: together.take(index)
        made = {"name": name, "shape": shape, "dtype": dtype, "make": take, "keep_dtype": True}
        return name, LazyWeight(**made, together=(together, *weight.together), holders=weight.holders)

    sent = []
    for index, part in enumerate(parts):
        sent.append(source(2 * index, part, shape, FP8))
        sent.append(source(2 * index + 1, part + SCALE, grid, torch.float32))
    return sent
