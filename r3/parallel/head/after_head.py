"""What a model does to its head's product before it returns it as logits, found out on a small copy."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ParallelError
from r3.parallel.small_copy import small_copy

_LENGTH = 4
_EXPONENTS = (-3.0, 5.0)  # of 10, in the probe: from where a soft cap is a line to where it is its cap


@dataclass(frozen=True, kw_only=True)
class AfterHead:
    """What comes after the head's product.

    Attributes:
        scale: the logits are the product times this,
        softcap: then c * tanh(. / c) with this c; None if they are not capped.
        vocabulary: tokens that are left; the head has as many rows or more.
    """

    scale: float
    softcap: float | None
    vocabulary: int


@torch.no_grad()
def find_after_head(model: Any) -> AfterHead:
    """Run a small copy of `model`, a transformers model, with a probe in the place of its head's product.

    Raises:
        ParallelError: the logits are not the scaled, soft-capped or cut product.
    """
    with torch.device("cpu"):  # models may be built on meta where this is called
        probe, logits = _run(small_copy(model))
    found = _described(probe[..., : logits.shape[-1]].double(), logits.double())
    if found is None:
        raise ParallelError(
            f"{type(model).__name__} changes its head's product in a way that is not known here: expected logits that "
            "are the product, times a constant, or soft-capped as c * tanh(logits / c), for the whole vocabulary or "
            f"its first tokens. {REMEDY}"
        )
    return found


REMEDY = "Score its logits with r3.parallel.token_logprobs, in a loop of your own"


def _run(model: Any) -> tuple[Tensor, Tensor]:
    """The probe `[1, S, V]`, and the logits that the model makes of it."""
    head = model.get_output_embeddings()
    vocabulary, device = head.weight.shape[0], head.weight.device
    values = torch.logspace(*_EXPONENTS, steps=max(1, vocabulary // 2 - 1))
    values = torch.cat([torch.ones(1), -torch.ones(1), values, -values, torch.ones(1)])[:vocabulary]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(_LENGTH)])
    probe = values[orders].to(device)[None]

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        return probe

    head.forward = MethodType(forward, head)
    tokens = torch.arange(3, 3 + _LENGTH, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    positions, mask = torch.arange(_LENGTH, device=device)[None], torch.ones_like(tokens)
    try:
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ParallelError(
            f"{type(model).__name__}: what it does to its head's product could not be found out. A small copy of it "
            f"failed on random weights ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    return probe, logits


def _described(probe: Tensor, logits: Tensor) -> AfterHead | None:
    """None if the logits are something else."""
    if logits.dim() != 3 or logits.shape != probe.shape:
        return None
    vocabulary = logits.shape[-1]
    scale = float(logits[probe == 1][0]) if (probe == 1).any() else 0.0
    if scale and torch.allclose(logits, probe * scale, rtol=1e-6, atol=0):
        return AfterHead(scale=scale, softcap=None, vocabulary=vocabulary)
    cap, smallest = float(logits.abs().max()), probe.abs().argmin()
    scale = float(logits.flatten()[smallest] / probe.flatten()[smallest])
    if cap and torch.allclose(logits, cap * (probe * scale / cap).tanh(), rtol=1e-5, atol=0):
        return AfterHead(scale=scale, softcap=cap, vocabulary=vocabulary)
    return None
