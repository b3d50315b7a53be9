"""The head's products, a chunk of tokens at a time: logits are there for one chunk only.

The backward pass computes each chunk's logits again, for only then is the upstream gradient of each token known. What
others have, and why it was not used: decision 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from r3.parallel.head import sampling_sets
from r3.parallel.head.passes import Tempering
from r3.parallel.head.sampling_sets import SamplingSets

_TILE = 128  # tokens that a matrix product computes together


def tokens_at_once(tokens: int, vocabulary: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: chunks of even size, in whole tiles where a chunk has several."""
    most = max(1, chunk_bytes // (4 * vocabulary))
    if most > _TILE:
        most -= most % _TILE
    even = -(-tokens // max(1, -(-tokens // most)))
    return max(1, min(most, -(-even // _TILE) * _TILE))


class ChunkedHead:
    """A head and the tokens that go through it.

    Args:
        hidden: floating `[n, H]`.
        weight: floating `[V, H]`.
        bias: `[V]` or None.
        labels: int64 `[n]`, of the vocabulary.
        tempering: from products to logits.
        tokens: of a chunk.
        sets: what each token was sampled from, in chunks of as many tokens; None for the whole vocabulary.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        tempering: Tempering,
        tokens: int,
        sets: SamplingSets | None = None,
    ) -> None:
        self._sets = sets
        self._hidden, self._weight, self._bias, self._labels = hidden, weight, bias, labels
        self._tempering = tempering
        self._tokens = tokens
        self._passes = _passes(hidden)
        self._left, self._right = _factors(hidden, weight)

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self._hidden), self._tokens):
            yield slice(start, start + self._tokens)

    def statistics(self, *, details: bool) -> Tensor:
        """Float32 `[2 or 4, n]`: rows of `Statistics`, the last two if `details`."""
        found = torch.empty(4 if details else 2, len(self._hidden), dtype=torch.float32, device=self._hidden.device)
        for at in self._chunks():
            self._add_statistics(at, found, details=details)
        return found

    def _add_statistics(self, at: slice, found: Tensor, *, details: bool) -> None:
        x = _product(self._left[at], self._right.t())
        labels, sets = self._labels[at], self._sets
        if sets is None or sets.any_whole:
            rows = self._passes.statistics(x, self._bias, labels, self._tempering, details=details)
            for row, values in zip(found, rows, strict=False):
                row[at] = values
        if sets is not None:
            part = sets.chunk(at, at.start // self._tokens)
            rows = sampling_sets.statistics(x, self._bias, labels, self._tempering, part, details=details)
            for row, values in zip(found, rows, strict=False):
                if values is not None:
                    row[at] = torch.where(part[0] > 0, values, row[at]) if sets.any_whole else values

    def gradients(
        self, normaliser: Tensor, upstream: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, each in its own dtype; None where `needed` is False.

        Args:
            normaliser: float32 `[n]`, from `statistics`.
            upstream: float32 `[n]`, gradient of the log-probabilities.
        """
        hidden, weight, bias = self._hidden, self._weight, self._bias
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        # In float32 over all chunks, and rounded once.
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed[1] else None
        of_bias = torch.zeros(weight.shape[:1], dtype=torch.float32, device=weight.device) if needed[2] else None
        for at in self._chunks():
            gradient = self._logits_gradient(at, normaliser[at], upstream[at])
            if of_hidden is not None:
                of_hidden[at] = _product(gradient, self._right)
            if of_weight is not None:
                _add_product(of_weight, gradient.t(), self._left[at])
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
            del gradient  # before the next chunk's logits
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        )

    def _logits_gradient(self, at: slice, normaliser: Tensor, upstream: Tensor) -> Tensor:
        x = _product(self._left[at], self._right.t())
        given = (x, self._bias, self._labels[at], normaliser, upstream, self._tempering)
        part = None if self._sets is None else self._sets.chunk(at, at.start // self._tokens)
        of_sets = None if part is None else sampling_sets.logits_gradient(*given, part)
        into = x if self._left.dtype == x.dtype else torch.empty_like(x, dtype=self._left.dtype)
        if self._sets is None or self._sets.any_whole:
            into = self._passes.logits_gradient(*given, into)
        if part is not None and of_sets is not None:
            sizes, tokens, ids = part
            into.masked_fill_((sizes > 0)[:, None], 0)
            into[tokens, ids] = of_sets.to(into.dtype)
        return into


def _passes(tensor: Tensor) -> ModuleType:
    """The module with the passes over the logits for the device of `tensor`."""
    if tensor.is_cuda:
        from r3.parallel.head import passes_cuda

        return passes_cuda
    from r3.parallel.head import passes

    return passes


def _factors(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two as they are multiplied: bfloat16 where the device sums products of it in float32, else float32."""
    sums = hidden.is_cuda and torch.version.cuda is not None
    if sums and hidden.dtype == weight.dtype == torch.bfloat16:
        return hidden, weight
    return hidden.float(), weight.float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """float32 `left @ right`."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to float32 `total`."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif torch.__version__ < "2.10":  # whose addmm takes no total of another dtype than the factors
        total += _product(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
