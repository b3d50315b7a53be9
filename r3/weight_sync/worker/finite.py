"""Checks that an engine's FP8 weights and scales are finite: vLLM leaves those that were not sent uninitialised."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Names = list[tuple[str, str]]
"""Of tensors: the layer, and the tensor in it."""


def check_finite_engine(model: nn.Module) -> list[str]:
    """Problems of the FP8 weights and scales of vLLM's `model`, with their names; empty if there are none.

    A scale that was not sent is uninitialised memory: NaN, or zero. Checks FP8 tensors, and parameters and buffers with
    "scale" in their names.
    """
    return queue_finite_check(dict(model.named_modules()))()


@torch.no_grad()
def queue_finite_check(layers: Mapping[str, nn.Module]) -> Callable[[], list[str]]:
    """Queue `check_finite_engine` for a model with these modules. The returned function waits for the GPU, once."""
    queued: dict[torch.device, tuple[list[tuple[Names, str]], list[Tensor]]] = {}
    with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters go through Python whenever they are touched
        for names, is_scale, rows in _to_check(layers):
            for problem, bad in _problems(rows, is_scale):
                checked, flags = queued.setdefault(rows.device, ([], []))
                checked.append((names, problem))
                flags.append(bad)

    def wrong() -> Iterator[str]:
        for checked, flags in queued.values():
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
    """Each possible problem, and bool `[rows]`: which rows have it."""
    if rows.dtype in _NAN_BITS:
        mask, pattern = _NAN_BITS[rows.dtype]
        yield "holds NaN", ((rows.view(torch.uint8) & mask) == pattern).any(1)
    elif rows.is_floating_point():
        yield "holds NaN or infinity", ~rows.isfinite().all(1)
        if is_scale:
            yield "holds a scale of zero", (rows == 0).any(1)
