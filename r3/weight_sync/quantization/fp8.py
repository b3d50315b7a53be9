"""Weights of a 16- or 32-bit trainer for an engine that holds them in FP8, in blocks with a scale each.

sync.push(quantised(named_weights(model), engine_config), version=1)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import SyncError, summary
from r3.weight_sync.quantization.block_scales import FP8, block_quantise
from r3.weight_sync.quantization.scheme import SCALE, Fp8Scheme, fp8_scheme
from r3.weight_sync.weights.lazy import Together, Weight, WeightSource, as_source, gathered

__all__ = ["Fp8Scheme", "block_quantise", "check_finite_engine", "fp8_scheme", "quantised"]

_AT_ONCE = 1 << 26

Names = list[tuple[str, str]]
"""Of tensors: the layer, and the tensor in it."""


def quantised(
    named: Iterable[tuple[str, Weight]], config: Any, *, checkpoint: str | Path | None = None
) -> list[tuple[str, WeightSource]]:
    """The weights as the engine's FP8 checkpoint has them: what it holds in FP8 as `X.weight` and `X.weight_scale_inv`.

    Each is quantised when its turn comes, on the device where it is made. Fused experts (`fused_experts=True`) are
    quantised all at once, which is faster, and sent apart under the names of the checkpoint: vLLM 0.26 turns the scales
    of fused ones by mistake. Those that stay as they are stay fused.

    Args:
        named: checkpoint names and weights, as `named_weights` gives them.
        config: Hugging Face configuration of the engine's model, or its `quantization_config`: `quant_method: fp8`,
            `weight_block_size`, `ignored_layers` or `modules_to_not_convert`, `scale_fmt`.
        checkpoint: folder from which the engine was started. With it, exactly those weights are quantised that have a
            scale there; without it, those that vLLM's rules say, from names.

    Raises:
        SyncError: another quantisation; a weight that the checkpoint holds in FP8 is missing; experts that checkpoints
            of this family hold in one tensor (gpt-oss, Llama 4, Qwen3-VL).
    """
    scheme = fp8_scheme(config, checkpoint)
    weights = [(name, as_source(name, weight)) for name, weight in named]
    if scheme.held is not None:
        there = {part for name, weight in weights for part in weight.parts or (name,)}
        lost = sorted(scheme.held - there)
        if lost:
            raise SyncError(f"weights that the checkpoint holds in FP8 are missing:{summary(lost)}")
    sent: list[tuple[str, WeightSource]] = []
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
    parts: tuple[str, ...], shape: torch.Size, weight: WeightSource, scheme: Fp8Scheme
) -> list[tuple[str, WeightSource]]:
    """The matrices `parts`, each of `shape`, which lie one after the other in `weight`, and their scales."""
    if len(shape) != 2 or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise SyncError(f"{weight.name}: expected a matrix of 16- or 32-bit numbers, got {tuple(shape)} {weight.dtype}")
    grid = torch.Size([-(-shape[0] // scheme.block[0]), -(-shape[1] // scheme.block[1])])

    def make() -> list[Tensor]:
        made: list[Tensor] = []
        # In float32, and with what is in between, a matrix takes many times its room: not all experts at once.
        for some in gathered(weight).reshape(-1, *shape).split(max(1, _AT_ONCE // shape.numel())):
            numbers, scales = block_quantise(some, scheme.block, power_of_two=scheme.power_of_two)
            made += [tensor for pair in zip(numbers, scales, strict=True) for tensor in pair]
        return made

    together = Together(make)

    def source(index: int, name: str, shape: torch.Size, dtype: torch.dtype) -> tuple[str, WeightSource]:
        take = lambda: together.take(index)
        return name, WeightSource(name=name, shape=shape, dtype=dtype, make=take, keep_dtype=True)

    sent = []
    for index, part in enumerate(parts):
        sent.append(source(2 * index, part, shape, FP8))
        sent.append(source(2 * index + 1, part + SCALE, grid, torch.float32))
    return sent


def check_finite_engine(model: nn.Module) -> list[str]:
    """What is wrong with the FP8 weights and scales of vLLM's `model`, by name; empty if nothing is.

    An expert's scale that was not sent is left as the memory happened to be: NaN, or zero. Looks at FP8 tensors and at
    whatever has "scale" in its name, parameters and buffers.
    """
    return queue_finite_check(dict(model.named_modules()))()


@torch.no_grad()
def queue_finite_check(layers: Mapping[str, nn.Module]) -> Callable[[], list[str]]:
    """`check_finite_engine` of the model with these modules: queued on a GPU, which the answer waits for, once."""
    found: dict[torch.device, tuple[list[tuple[Names, str]], list[Tensor]]] = {}
    with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters go through Python whenever they are touched
        for names, is_scale, rows in _to_check(layers):
            for problem, bad in _problems(rows, is_scale):
                checked, flags = found.setdefault(rows.device, ([], []))
                checked.append((names, problem))
                flags.append(bad)

    def wrong() -> Iterator[str]:
        for checked, flags in found.values():
            bad = iter(torch.cat(flags).tolist())
            for names, problem in checked:
                yield from (f"{layer}.{own}".strip(".") + f": {problem}" for layer, own in names if next(bad))

    return lambda: sorted(wrong())


def _to_check(layers: Mapping[str, nn.Module]) -> Iterator[tuple[Names, bool, Tensor]]:
    """(names, whether they are scales, `[names, elements]`): single numbers together, others each by itself."""
    numbers: dict[tuple[torch.Size, torch.device, torch.dtype, bool], tuple[Names, list[Tensor]]] = {}
    for layer, module in layers.items():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_scale = "scale" in own
            if tensor is None or not (is_scale or tensor.dtype in _NAN_BITS) or tensor.is_meta or not tensor.numel():
                continue
            if tensor.numel() > 1:
                yield [(layer, own)], is_scale, tensor.reshape(1, -1)
                continue
            names, alike = numbers.setdefault((tensor.shape, tensor.device, tensor.dtype, is_scale), ([], []))
            names.append((layer, own))
            alike.append(tensor)
    for (_, _, _, is_scale), (names, alike) in numbers.items():
        yield names, is_scale, torch.stack(alike).reshape(-1, 1)


# FP8 has no arithmetic: mask of the bits to look at, and their pattern in a NaN.
_NAN_BITS = {
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e4m3fnuz: (0xFF, 0x80),
    torch.float8_e8m0fnu: (0xFF, 0xFF),
}


def _problems(rows: Tensor, is_scale: bool) -> Iterator[tuple[str, Tensor]]:
    """What can be wrong, and bool `[rows]`."""
    if rows.dtype in _NAN_BITS:
        mask, pattern = _NAN_BITS[rows.dtype]
        yield "holds NaN", ((rows.view(torch.uint8) & mask) == pattern).any(1)
    elif rows.is_floating_point():
        yield "holds NaN or infinity", ~rows.isfinite().all(1)
        if is_scale:
            yield "holds a scale of zero", (rows == 0).any(1)
