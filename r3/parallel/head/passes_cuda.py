"""The passes of `r3.parallel.head.passes` as Triton kernels: each reads the logits once.

Needs Triton; imported only when there is a tensor on CUDA.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r3.parallel.head.passes import Statistics, Tempering

_BLOCK = 4096  # logits of a row that a program holds at once
_WARPS = 8
_LOW = tl.constexpr(-1e30)  # below every logit, and finite: what is multiplied by 0 has to give 0


def statistics(x: Tensor, bias: Tensor | None, labels: Tensor, tempering: Tempering, *, details: bool) -> Statistics:
    """As `r3.parallel.head.passes.statistics`."""
    found = torch.empty(4 if details else 2, len(x), dtype=torch.float32, device=x.device)
    launch: Any = _statistics[(len(x),)]
    with torch.cuda.device(x.device):
        launch(
            x,
            x if bias is None else bias,
            labels,
            found,
            len(x),
            x.shape[1],
            x.stride(0),
            tempering.post,
            tempering.pre or 0.0,
            biased=bias is not None,
            capped=tempering.pre is not None,
            details=details,
            block=_BLOCK,
            num_warps=_WARPS,
        )
    return Statistics(found[0], found[1], *(found[2:] if details else (None, None)))


def logits_gradient(
    x: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    normaliser: Tensor,
    upstream: Tensor,
    tempering: Tempering,
    into: Tensor,
) -> Tensor:
    """As `r3.parallel.head.passes.logits_gradient`."""
    launch: Any = _logits_gradient[(len(x), triton.cdiv(x.shape[1], _BLOCK))]
    with torch.cuda.device(x.device):
        launch(
            x,
            x if bias is None else bias,
            labels,
            normaliser,
            upstream,
            into,
            x.shape[1],
            x.stride(0),
            into.stride(0),
            tempering.post,
            tempering.pre or 0.0,
            biased=bias is not None,
            capped=tempering.pre is not None,
            block=_BLOCK,
            num_warps=_WARPS,
        )
    return into


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _tempered(x, post, pre, capped: tl.constexpr):
    if capped:
        return post * _tanh(pre * x)
    return post * x


@triton.jit(do_not_specialize=["tokens"])
def _statistics(
    x,
    bias,
    labels,
    found,
    tokens,
    vocabulary,
    stride,
    post,
    pre,
    biased: tl.constexpr,
    capped: tl.constexpr,
    details: tl.constexpr,
    block: tl.constexpr,
):
    """A program for each token. Each lane keeps the largest z that it saw and sums from there on; lanes are joined at
    the end. So a logit costs one exponential, and no block waits for a reduction."""
    token = tl.program_id(0).to(tl.int64)
    row = x + token * stride
    lane = tl.arange(0, block)
    largest = tl.full([block], _LOW, tl.float32)
    second = tl.full([block], _LOW, tl.float32)
    total = tl.zeros([block], tl.float32)  # of exp(z - largest)
    weighted = tl.zeros([block], tl.float32)  # of exp(z - largest) * (z - largest)
    for start in tl.range(0, vocabulary, block, num_stages=2):
        index = start + lane
        inside = index < vocabulary
        value = tl.load(row + index, mask=inside, other=0)
        if biased:
            value += tl.load(bias + index, mask=inside, other=0).to(tl.float32)
        z = tl.where(inside, _tempered(value, post, pre, capped), _LOW)
        rises = z > largest
        step = tl.where(rises, largest - z, z - largest)  # not above 0; NaN where z is, so that the sum becomes NaN
        e = tl.exp(step)
        if details:
            product = tl.where(e > 0, e * step, 0)
            weighted = tl.where(rises, e * weighted + product * total, weighted + product)
            second = tl.maximum(second, tl.minimum(largest, z))
        total = tl.where(rises, total * e + 1, total + e)
        largest = tl.where(rises, z, largest)
    top = tl.max(largest)
    shift = largest - top
    share = tl.exp(shift)
    mass = tl.sum(total * share)
    normaliser = top + tl.log(mass)

    label = tl.load(labels + token)
    own = tl.load(row + label)
    if biased:
        own += tl.load(bias + label).to(tl.float32)
    tl.store(found + token, _tempered(own, post, pre, capped) - normaliser)
    tl.store(found + tokens + token, normaliser)
    if details:
        entropy = tl.log(mass) - tl.sum(share * (weighted + total * shift) / mass)
        tl.store(found + 2 * tokens + token, entropy)
        at = tl.argmax(largest, 0)
        runner_up = tl.max(tl.where(lane == at, second, largest))
        margin = tl.where(runner_up > _LOW, top - runner_up, float("inf"))  # pyrefly: ignore
        tl.store(found + 3 * tokens + token, margin)


@triton.jit
def _logits_gradient(
    x,
    bias,
    labels,
    normaliser,
    upstream,
    into,
    vocabulary,
    stride,
    into_stride,
    post,
    pre,
    biased: tl.constexpr,
    capped: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    inside = index < vocabulary
    value = tl.load(x + token * stride + index, mask=inside, other=0)
    if biased:
        value += tl.load(bias + index, mask=inside, other=0).to(tl.float32)
    p = tl.exp(_tempered(value, post, pre, capped) - tl.load(normaliser + token))
    gradient = (tl.where(index == tl.load(labels + token), 1.0, 0.0) - p) * (tl.load(upstream + token) * post)
    if capped:
        tanh = _tanh(pre * value)
        gradient *= pre * (1 - tanh * tanh)
    tl.store(into + token * into_stride + index, gradient.to(into.dtype.element_ty), mask=inside)
