"""Per-token log-probabilities and their mean over ranks, of rows that are packed and sliced.

Labels are shifted on whole rows, before they are sliced: a slice's last position predicts the next slice's first token.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from r3.errors import ParallelError
from r3.routing.positions import text_positions

IGNORED = -100


def next_tokens(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """int64 `[B, S]`, the token after each position of whole rows; -100 where its sequence ends there.

    Args:
        input_ids: `[B, S]`.
        position_ids: `[B, S]`, restarting with each sequence and on padding; or `[4, B, S]` or `[3, B, S]` of a model
            with multimodal rope.

    Example:
        >>> next_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]]))  # two packed sequences
        tensor([[   6, -100,    8, -100]])
    """
    position_ids = text_positions(position_ids)
    labels = input_ids.long().roll(-1, dims=1)
    goes_on = position_ids.roll(-1, dims=1) == position_ids + 1
    goes_on[:, -1] = False
    return labels.masked_fill(~goes_on, IGNORED)


def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Float32 `[B, S]`, log-probability in nats of each label; 0 where it is -100.

    Args:
        logits: `[B, S, V]`, of this rank's slice.
        labels: int64 `[B, S]`, sliced like the input.
        temperature: the logits are divided by it, as at sampling.

    Raises:
        ParallelError: labels of another dtype; uint8 takes 156 for -100.
    """
    if labels.dtype != torch.int64:
        raise ParallelError(f"labels: expected torch.int64, got {labels.dtype}; use labels.long()")
    wanted = labels != IGNORED
    logprobs = -F.cross_entropy(logits[wanted].float() / temperature, labels[wanted], reduction="none")
    return torch.zeros(labels.shape, dtype=logprobs.dtype, device=logprobs.device).masked_scatter(wanted, logprobs)


def mean_over_ranks(total: Tensor, count: Tensor | float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scalar to call `backward` on where gradients are averaged over `group`, as FSDP and DDP do.

    The averaged gradient is that of sum(total) / sum(count) over all ranks: the mean over tokens, however they are
    spread over data and sequence ranks. Its own value, averaged over ranks, is that mean.

    Args:
        total: scalar, this rank's sum over its tokens.
        count: this rank's number of tokens.
        group: ranks over which gradients are averaged; None for all.

    Raises:
        ParallelError: no tokens on any rank.
    """
    everyone = torch.as_tensor(count, dtype=torch.float64, device=total.device).clone()
    dist.all_reduce(everyone, group=group)
    if everyone == 0:
        raise ParallelError("expected at least one token in the loss, on any rank, got none")
    return total * (dist.get_world_size(group) / everyone).to(total.dtype)
