"""What stands between the products, as Triton kernels. `plain` says what each does; results are equal up to rounding.

All are bound by memory: each number is read and written once, sums are in float32. Needs Triton; imported only when
there is a tensor on CUDA.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3.experts.order import Order

_COLUMNS = 1024  # most of one program: 16 bytes a thread and load
_TILE = 4096  # numbers of a program that has several rows


def spread(tokens: Tensor, order: Order) -> Tensor:
    (count, slots), width = order.places.shape, tokens.shape[1]
    out = tokens.new_empty(count * slots, width)
    block = _block(width)
    _launch(_spread, (count, triton.cdiv(width, block)), tokens, order.places, out, width, slots, block)
    return out


def combine(rows: Tensor, order: Order, weights: Tensor | None = None) -> Tensor:
    (count, slots), width = order.places.shape, rows.shape[1]
    out = rows.new_empty(count, width)
    block, weigh = _block(width), weights is not None
    grid = (count, triton.cdiv(width, block))
    given = weights if weigh else rows  # never read
    _launch(_combine, grid, rows, order.places, given, order.ends[-1:], out, width, slots, weigh, block)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(count, width)
    block = _block(width)
    height = _TILE // block
    grid = (triton.cdiv(count, height), triton.cdiv(width, block))
    _launch(_swiglu, grid, gate_up, out, count, width, height, block, num_warps=8)
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor, weights: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    count, width = grad.shape
    out = torch.empty_like(gate_up), torch.empty_like(grad), torch.empty_like(weights)
    block = _block(width)
    height = _TILE // block
    given = gate_up, grad, weights, order.slots, order.ends[-1:]
    _launch(_swiglu_backward, (triton.cdiv(count, height),), *given, *out, count, width, height, block, num_warps=8)
    return out


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), _COLUMNS)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


@triton.jit
def _spread(tokens, places, out, width: tl.constexpr, slots: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    values = tl.load(tokens + token * width + columns, mask=inside)
    for slot in tl.static_range(slots):
        place = tl.load(places + token * slots + slot).to(tl.int64)
        tl.store(out + place * width + columns, values, mask=inside)


@triton.jit
def _combine(
    rows, places, weights, last, out, width: tl.constexpr, slots: tl.constexpr, weigh: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    end = tl.load(last)
    total = tl.zeros([block], tl.float32)
    for slot in tl.static_range(slots):
        place = tl.load(places + token * slots + slot)
        bound = tl.where(place < end, width, 0)
        part = tl.load(rows + place.to(tl.int64) * width + columns, mask=columns < bound, other=0).to(tl.float32)
        if weigh:
            part *= tl.load(weights + token * slots + slot).to(tl.float32)
        total += part
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_up, out, count, width: tl.constexpr, height: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)[:, None]
    columns = (tl.program_id(1) * block + tl.arange(0, block))[None]
    inside = (row < count) & (columns < width)
    gate = tl.load(gate_up + row * (2 * width) + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * width) + width + columns, mask=inside, other=0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gate_up, grad, weights, slots, last, grad_gate_up, weighted, grad_weights,
    count, width: tl.constexpr, height: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    present = index < count
    slot = tl.load(slots + index, mask=present, other=0)
    weight = tl.load(weights + slot, mask=present, other=0).to(tl.float32)[:, None]
    row = index[:, None]
    dots = tl.zeros([height], tl.float32)
    dtype = weighted.dtype.element_ty
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)[None]
        inside = present[:, None] & (columns < width)
        here = row * (2 * width) + columns
        gate = tl.load(gate_up + here, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up + here + width, mask=inside, other=0).to(tl.float32)
        change = tl.load(grad + row * width + columns, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        active = gate * sigmoid
        product = active * up
        dots += tl.sum(change * product, 1)
        change *= weight
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(grad_gate_up + here, (change * up * slope).to(dtype), mask=inside)
        tl.store(grad_gate_up + here + width, (change * active).to(dtype), mask=inside)
        tl.store(weighted + row * width + columns, (weight * product).to(dtype), mask=inside)
    dots = tl.where(index < tl.load(last), dots, 0.0)
    tl.store(grad_weights + slot, dots.to(grad_weights.dtype.element_ty), mask=present)
