"""The passes of `r3.parallel.head.passes` over the ids that each token was sampled from, in place of the vocabulary.

Shapes: n tokens, c of them in a chunk, t ids of their sets together. Only torch: a set is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r3.errors import ParallelError
from r3.parallel.head.passes import Statistics, Tempering


@dataclass(frozen=True, eq=False)
class SamplingSets:
    """Sets of n tokens.

    Attributes:
        sizes: int64 `[n]`; 0 for the whole vocabulary.
        ids: int64 `[t]`.
        starts: of each chunk's ids, and the end of the last, on the host.
        any_whole: whether some token has no set.
    """

    sizes: Tensor
    ids: Tensor
    starts: tuple[int, ...]
    any_whole: bool

    @classmethod
    def of(cls, sizes: Tensor, ids: Tensor, labels: Tensor, vocabulary: int, tokens: int) -> SamplingSets:
        """Sets in chunks of `tokens`.

        Raises:
            ParallelError: an id outside of the vocabulary, or a label outside of its set.
        """
        ids = ids.long()
        own = segmented((ids == torch.repeat_interleave(labels, sizes)).float(), sizes, "sum")
        outside = ((own != 1) & (sizes > 0)).sum()
        ends = sizes.cumsum(0)[[min(at + tokens, len(sizes)) - 1 for at in range(0, len(sizes), tokens)]]
        low, high = ids.aminmax() if len(ids) else (sizes.new_zeros(()), sizes.new_zeros(()))
        told = torch.cat([torch.stack([outside, low, high, (sizes == 0).sum()]), ends]).tolist()
        if told[0] or told[1] < 0 or told[2] >= vocabulary:
            raise ParallelError(
                f"sampling mask: expected ids of the vocabulary of {vocabulary}, and each label once in its set, got "
                f"ids from {told[1]} to {told[2]} and {told[0]} labels that are not: is it shifted as the labels are?"
            )
        return cls(sizes, ids, (0, *told[4:]), bool(told[3]))

    def chunk(self, at: slice, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of chunk `number`, whose tokens are `at`: sizes `[c]`, the token of each id `[t]`, the ids `[t]`."""
        sizes = self.sizes[at]
        ids = self.ids[self.starts[number] : self.starts[number + 1]]
        tokens = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=len(ids))
        return sizes, tokens, ids


def statistics(
    x: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    tempering: Tempering,
    sets: tuple[Tensor, Tensor, Tensor],
    *,
    details: bool,
) -> Statistics:
    """As `passes.statistics`, of tokens with a set; what it returns for others has no meaning."""
    sizes, tokens, ids = sets
    z = _chosen(x, bias, tempering, tokens, ids)
    top = segmented(z, sizes, "max")
    shifted = z - top[tokens]
    e = shifted.exp()
    mass = segmented(e, sizes, "sum")
    own = x.gather(1, labels[:, None])[:, 0]
    own = tempering(own if bias is None else own + bias[labels])
    normaliser = top + mass.log()
    if not details:
        return Statistics(own - normaliser, normaliser, None, None)
    entropy = mass.log() - segmented(e * shifted, sizes, "sum") / mass
    # The second: the largest of what is left without one of the largest.
    at_top = shifted == 0
    several = segmented(at_top.float(), sizes, "sum") > 1
    second = segmented(z.masked_fill(at_top, -math.inf), sizes, "max")
    return Statistics(own - normaliser, normaliser, entropy, (top - second).masked_fill(several, 0))


def logits_gradient(
    x: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    normaliser: Tensor,
    upstream: Tensor,
    tempering: Tempering,
    sets: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Float32 `[t]`, the gradient of `(logprobs * upstream).sum()` in the products of the sets' ids."""
    _, tokens, ids = sets
    z = _chosen(x, bias, tempering, tokens, ids)
    gradient = (ids == labels[tokens]).float() - (z - normaliser[tokens]).exp()
    return gradient * upstream[tokens] * tempering.slope(z)


def segmented(values: Tensor, sizes: Tensor, reduce: str) -> Tensor:
    """`[n]`, the sum or the maximum of each set's part of `[t]`; 0 or -inf for an empty one. The same in every run."""
    return torch.segment_reduce(values, reduce, lengths=sizes, unsafe=True)


def _chosen(x: Tensor, bias: Tensor | None, tempering: Tempering, tokens: Tensor, ids: Tensor) -> Tensor:
    products = x[tokens, ids]
    return tempering(products if bias is None else products + bias[ids])
