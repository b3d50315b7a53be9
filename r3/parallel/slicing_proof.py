"""Proof that positions interact in attention alone, so that a slice of the sequence can be computed by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r3.errors import ParallelError

_LENGTH = 6


def prove_local(model: nn.Module) -> None:
    """Run `model` on a few tokens with attention that isolates positions, and check that no positions interact.

    The gradient of one position's output must be exactly zero in all other positions' embeddings. Convolutions, state
    space layers and linear attention fail this; so does anything else that looks at neighbours.

    Args:
        model: with an attention function under which each position sees itself alone.

    Raises:
        ParallelError: positions interact elsewhere.
    """
    outermost = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    embedding = outermost.get_input_embeddings()
    embedded: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    device = next(embedding.parameters()).device
    tokens = torch.arange(3, 3 + _LENGTH, device=device)[None] % embedding.weight.shape[0]
    handle = embedding.register_forward_hook(catch)
    at = _LENGTH // 2
    try:
        with _evaluating(model), torch.enable_grad():
            positions = torch.arange(_LENGTH, device=device)[None]
            mask = torch.ones_like(tokens, dtype=torch.bool)
            try:
                output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ParallelError(
                    f"{type(outermost).__name__} cannot run on slices or packed rows: expected a forward that leaves "
                    f"the attention mask to its attention function, it failed without one ({type(error).__name__}: "
                    f"{error}). Sparse attention with an indexer does that"
                ) from error
            hidden = output[0][0, at].float()
            weights = torch.linspace(0.5, 1.5, hidden.numel(), device=device)
            (gradient,) = torch.autograd.grad((hidden * weights).sum(), embedded[0])
    finally:
        handle.remove()
    reached = gradient[0].abs().amax(-1)
    others = [position for position in range(_LENGTH) if position != at and reached[position] != 0]
    if others or not reached[at].isfinite():
        raise ParallelError(
            f"{type(outermost).__name__} cannot run on slices or packed rows: position {at} depends on {others} also "
            "where attention lets it see itself alone. A layer mixes positions outside transformers' attention "
            "interface (a convolution, a state space, linear attention), or computes attention by itself"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
