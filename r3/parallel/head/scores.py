"""Log-probabilities of sampled tokens from hidden states and the head's weight, without holding all logits.

Shapes: n tokens with a label, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r3.errors import ParallelError
from r3.parallel.head.chunks import ChunkedHead, tokens_at_once
from r3.parallel.head.passes import Tempering
from r3.parallel.head.sampling_sets import SamplingSets
from r3.parallel.token_logprobs import IGNORED
from r3.sampling_mask import SamplingMask

CHUNK_BYTES = 1 << 30
"""Of one chunk's logits in float32. With each chunk the weight's gradient, as large as the logits of H tokens, is read
and written once."""


class TokenScores(NamedTuple):
    """Scores of each token, float32 `[...]` as the labels, 0 where there is no label.

    Attributes:
        logprobs: log-probability of the label, in nats.
        entropy: of the distribution that the label was drawn from, in nats; without gradient.
        margin: log-probability of its likeliest token less that of the next, in nats; without gradient. Infinite for a
            vocabulary of one.
    """

    logprobs: Tensor
    entropy: Tensor
    margin: Tensor


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    sampling_mask: SamplingMask | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Float32 `[...]`, log-probability in nats of each label under the head's distribution; 0 where it is -100.

    As `token_logprobs(hidden @ weight.T + bias, labels)`, with float32 logits of which only a chunk is in memory at a
    time, in the forward pass and in the backward pass.

    On CUDA, hidden states and weight in bfloat16 are multiplied as they are and summed in float32: the logits are those
    of a float32 product of the same values, up to the order of its sum. The gradient of the logits is rounded to
    bfloat16, its products are summed in float32. In any other case all products are float32 products of the values.

    Args:
        hidden: floating `[..., H]`.
        weight: floating `[V, H]`.
        labels: int64 `[...]`; only positions with a label are computed.
        bias: `[V]`, added to the product.
        temperature: the logits are divided by it, as at sampling.
        scale: the logits are multiplied by it before that, as some models do.
        softcap: c of models that put c * tanh(logits / c) in the place of the scaled logits.
        sampling_mask: `[...]`, the ids that each label was sampled from, over which its logits are normalised; None for
            the whole vocabulary.
        chunk_bytes: of the float32 logits of one chunk; at least 1 token's are computed together.

    Raises:
        ParallelError: other shapes, dtypes or devices, labels outside of the vocabulary or of their sets, or a
            temperature of 0.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(50, 16)
        >>> logprobs = head_logprobs(hidden, weight, torch.full((2, 5), 7), temperature=0.8)
        >>> logprobs.sum().backward()
    """
    tempering = Tempering.of(temperature=temperature, scale=scale, softcap=softcap)
    return score(
        hidden, weight, labels, bias, tempering, sampling_mask=sampling_mask, details=False, chunk_bytes=chunk_bytes
    )[0]


def head_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    sampling_mask: SamplingMask | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """As `head_logprobs`, with entropy and top margin of each token's distribution from the same pass."""
    tempering = Tempering.of(temperature=temperature, scale=scale, softcap=softcap)
    return TokenScores(
        *score(
            hidden, weight, labels, bias, tempering, sampling_mask=sampling_mask, details=True, chunk_bytes=chunk_bytes
        )
    )


@torch.compiler.disable
def score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    tempering: Tempering,
    *,
    details: bool,
    sampling_mask: SamplingMask | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, ...]:
    """As `head_logprobs`, one tensor; or as `head_scores`, three, if `details`."""
    _check_shapes(hidden, weight, labels, bias)
    flat = labels.reshape(-1)
    places = (flat != IGNORED).nonzero()[:, 0]
    wanted = flat[places]
    _check_labels(wanted, weight.shape[0])
    tokens = tokens_at_once(len(places), weight.shape[0], chunk_bytes)
    sets = None if sampling_mask is None else _sets(sampling_mask, labels, places, wanted, weight.shape[0], tokens)
    with torch.autocast(hidden.device.type, enabled=False):
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
        found = _HeadScores.apply(chosen, weight, bias, wanted, tempering, tokens, sets, details)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(flat.shape).index_put((places,), values).view(labels.shape)

    return tuple(placed(values) for values in found)


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if labels.dtype != torch.int64:
        raise ParallelError(f"labels: expected torch.int64, got {labels.dtype}; use labels.long()")
    if (
        hidden.shape[:-1] != labels.shape
        or weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ParallelError(
            "expected hidden [..., H], weight [V, H], labels [...] and bias [V] or none, got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    others = [part for part in (weight, labels, bias) if part is not None and part.device != hidden.device]
    if others or not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ParallelError(
            f"expected floating hidden states and weight, and all on one device, got {hidden.dtype} on {hidden.device} "
            f"and {weight.dtype} on {weight.device}, labels on {labels.device}"
        )


def _sets(
    mask: SamplingMask, labels: Tensor, places: Tensor, wanted: Tensor, vocabulary: int, tokens: int
) -> SamplingSets:
    if mask.shape != labels.shape or mask.sizes.device != labels.device:
        raise ParallelError(
            f"sampling mask: expected {tuple(labels.shape)} on {labels.device}, as the labels, got "
            f"{tuple(mask.shape)} on {mask.sizes.device}"
        )
    chosen = mask.take(places)
    return SamplingSets.of(chosen.sizes, chosen.token_ids, wanted, vocabulary, tokens)


def _check_labels(wanted: Tensor, vocabulary: int) -> None:
    if not len(wanted):
        return
    low, high = torch.stack(wanted.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        raise ParallelError(
            f"labels: expected {IGNORED} or token ids below {vocabulary}, the head's vocabulary, got "
            f"{low if low < 0 else high}"
        )


class _HeadScores(torch.autograd.Function):
    """float `[n, H]`, `[V, H]`, `[V]` or None and labels `[n]` -> float32 `[n]` each: see `TokenScores`."""

    @staticmethod
    def forward(  # pyrefly: ignore
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        tempering: Tempering,
        tokens: int,
        sets: SamplingSets | None,
        details: bool,
    ) -> tuple[Tensor, ...]:
        found = ChunkedHead(hidden, weight, bias, labels, tempering, tokens, sets).statistics(details=details)
        logprobs, normaliser, *rest = found.unbind()
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser)
        ctx.tempering, ctx.tokens, ctx.sets = tempering, tokens, sets
        ctx.mark_non_differentiable(*rest)
        return logprobs.clone(), *rest  # no view of the others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        hidden, weight, bias, labels, normaliser = ctx.saved_tensors
        chunked = ChunkedHead(hidden, weight, bias, labels, ctx.tempering, ctx.tokens, ctx.sets)
        with torch.autocast(upstream.device.type, enabled=False):
            gradients = chunked.gradients(normaliser, upstream.contiguous(), ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None
