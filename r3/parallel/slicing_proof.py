"""Proof that positions interact in attention alone, so that a slice of the sequence can be computed by itself."""

from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ParallelError
from r3.parallel.small_copy import small_copy

_LENGTH = 6


@torch.inference_mode(False)
@torch.enable_grad()
def prove_local(model: Any) -> None:
    """Run a small copy of `model` on a few tokens with attention that isolates positions: no positions may interact.

    The gradient of one position's output must be exactly zero in all other positions' embeddings. Convolutions, state
    space layers and linear attention fail this; so does anything else that looks at neighbours.

    Args:
        model: a transformers model, with an attention function under which each position sees itself alone.

    Raises:
        ParallelError: positions interact elsewhere.
    """
    with torch.device("cpu"):  # models may be built on meta where this is called
        _prove(small_copy(model))


def _prove(model: Any) -> None:
    embedding = model.get_input_embeddings()
    embedded: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    device = embedding.weight.device
    tokens = torch.arange(3, 3 + _LENGTH, device=device)[None] % embedding.weight.shape[0]
    embedding.register_forward_hook(catch)
    at = _LENGTH // 2
    positions = torch.arange(_LENGTH, device=device)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    try:
        output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ParallelError(
            f"{type(model).__name__} cannot run on slices or packed rows: expected a forward that leaves the attention "
            f"mask to its attention function, it failed without one on random weights ({type(error).__name__}: "
            f"{error}). Sparse attention with an indexer does that"
        ) from error
    hidden = output[0][0, at].float()
    weights = torch.linspace(0.5, 1.5, hidden.numel(), device=device)
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), embedded[0])
    reached = gradient[0].abs().amax(-1)
    others = [position for position in range(_LENGTH) if position != at and reached[position] != 0]
    if others or not reached[at].isfinite():
        raise ParallelError(
            f"{type(model).__name__} cannot run on slices or packed rows: position {at} depends on {others} also "
            "where attention lets it see itself alone. A layer mixes positions outside transformers' attention "
            "interface (a convolution, a state space, linear attention), or computes attention by itself"
        )
