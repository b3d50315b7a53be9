"""A product in float32 that gives a row the same bits in any batch.

Needs Triton; imported only when there is a tensor on CUDA.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _INNER = 16, 32, 64  # of a program's block


def float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 `[..., O]` of float32 `[..., I]` and `[O, I]`: each number is summed in one order, without TF32."""
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    output = rows.new_empty(len(rows), len(weight))
    if len(rows):
        launch: Any = _product[triton.cdiv(len(rows), _ROWS), triton.cdiv(len(weight), _COLUMNS)]
        with torch.cuda.device_of(x):
            launch(rows, weight, output, *rows.shape, len(weight), rows=_ROWS, columns=_COLUMNS, inner=_INNER)
    return output.view(*x.shape[:-1], len(weight))


@triton.jit
def _product(x, weight, output, count, width, outputs, rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros((rows, columns), tl.float32)
    for start in range(0, width, inner):
        at = start + tl.arange(0, inner)
        left = tl.load(x + row[:, None] * width + at, (row[:, None] < count) & (at < width), 0.0)
        right = tl.load(weight + column * width + at[:, None], (column < outputs) & (at[:, None] < width), 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (row[:, None] < count) & (column < outputs)
    tl.store(output + row[:, None] * outputs + column, total, inside)
