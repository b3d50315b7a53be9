"""The two passes over the logits of a chunk of tokens: their statistics, and their gradient. In plain torch.

`r3.parallel.head.passes_cuda` does the same in one read each; on other devices than CUDA, and as what the tests hold
the kernels to, these run. Shapes: n tokens of the chunk, V logits of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from r3.errors import ParallelError


@dataclass(frozen=True, kw_only=True)
class Tempering:
    """From the head's product x to the logits z that are normalised: `post * x`, or `post * tanh(pre * x)`.

    Attributes:
        post: scale over temperature; with a soft cap: cap over temperature.
        pre: scale over cap; None without a soft cap.
    """

    post: float
    pre: float | None = None

    @classmethod
    def of(cls, *, temperature: float, scale: float, softcap: float | None) -> Tempering:
        """Raises `ParallelError` for a temperature or a cap that is not above 0."""
        for name, value in (("temperature", temperature), ("softcap", softcap)):
            if value is not None and not 0 < value < math.inf:
                raise ParallelError(f"{name}: expected a number above 0, got {value}")
        if softcap is None:
            return cls(post=scale / temperature)
        return cls(post=softcap / temperature, pre=scale / softcap)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.post if self.pre is None else (x * self.pre).tanh_().mul_(self.post)

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx where `self(x)` is `z`."""
        return self.post if self.pre is None else self.pre * (self.post - z.square() / self.post)


class Statistics(NamedTuple):
    """Of each token, float32 `[n]`, in nats; the last two None where they were not asked for."""

    logprobs: Tensor
    normaliser: Tensor  # logsumexp of z
    entropy: Tensor | None
    margin: Tensor | None


def statistics(x: Tensor, bias: Tensor | None, labels: Tensor, tempering: Tempering, *, details: bool) -> Statistics:
    """One pass over float32 `[n, V]`.

    Args:
        x: products of hidden states and weight.
        bias: `[V]`, added to `x`.
        labels: int64 `[n]`, from 0 to V - 1.
        details: whether entropy and margin are wanted.
    """
    z = tempering(x if bias is None else x + bias)
    normaliser = z.logsumexp(1)
    logprobs = z.gather(1, labels[:, None])[:, 0] - normaliser
    if not details:
        return Statistics(logprobs, normaliser, None, None)
    top = z.topk(min(2, z.shape[1])).values
    margin = top[:, 0] - top[:, 1] if z.shape[1] > 1 else top[:, 0].new_full((len(z),), math.inf)
    p = (z - normaliser[:, None]).exp_()
    # z from its largest on, which keeps the sum small at a low temperature.
    entropy = normaliser - top[:, 0] - (p * (z - top[:, :1]).masked_fill_(p == 0, 0)).sum(1)
    return Statistics(logprobs, normaliser, entropy, margin)


def logits_gradient(
    x: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    normaliser: Tensor,
    upstream: Tensor,
    tempering: Tempering,
    into: Tensor,
) -> Tensor:
    """The gradient of `(logprobs * upstream).sum()` in `x`, `[n, V]`, written to `into` in its dtype.

    Args:
        x, bias, labels: as for `statistics`.
        normaliser: what it returned.
        upstream: float32 `[n]`.
    """
    z = tempering(x if bias is None else x + bias)
    gradient = (z - normaliser[:, None]).exp_().neg_()
    rows = gradient.new_ones(len(labels), 1)
    gradient.scatter_add_(1, labels[:, None], rows)
    return into.copy_(gradient.mul_(upstream[:, None]).mul_(tempering.slope(z)))
