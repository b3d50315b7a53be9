"""Where top_k, top_p or min_p cut what other trainers sample from: capture, refusals, and logits over the sets.

Shapes: B rows, S positions, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from r3.capture.engine import is_truncated
from r3.capture.kept_ids import SPARE
from r3.errors import ReplayError
from r3.sampling_mask import SamplingMask
from trainer_hooks.support import Refusal

_TAKEN_OUT = -1e30
"""In place of minus infinity, of which entropy (p * z) would be NaN; of the same probability, 0."""


def logprobs_asked(sampling: Mapping[str, Any]) -> int:
    """`logprobs` of requests with these `vllm.SamplingParams`, from which their sets are read; 0 if there are none."""
    return sampling["top_k"] + SPARE if is_truncated(sampling) else 0


def without_bound(sampling_of: Callable[[Any], Mapping[str, Any]]) -> Refusal:
    """Of `top_p` or `min_p` without `top_k`.

    Args:
        sampling_of: the `vllm.SamplingParams` that a subject of refusals samples with; all of temperature, top_p,
            top_k and min_p are there.
    """

    def found(subject: Any) -> bool:
        sampling = sampling_of(subject)
        return is_truncated(sampling) and sampling["top_k"] <= 0

    return Refusal(
        setting="top_p or min_p without top_k",
        why="training needs the ids that each token was sampled from, which without top_k may be the whole vocabulary: "
        "too many to send with each token",
        cure="Set top_k, to 50 for one, or leave top_p at 1 and min_p at 0",
        found=found,
    )


def truncated_without(
    *,
    setting: str,
    cure: str,
    sampling_of: Callable[[Any], Mapping[str, Any]],
    carried: Callable[[Any], bool] = lambda subject: False,
) -> Refusal:
    """Of sampling from less than the vocabulary, for a trainer to which the ids do not come.

    Args:
        setting: by the trainer's own name.
        cure: what to do instead.
        sampling_of: the `vllm.SamplingParams` that a subject of refusals samples with.
        carried: whether the trainer brings the ids by itself.
    """
    return Refusal(
        setting=setting,
        why="rollouts are then sampled from a part of the vocabulary, and the trainer's log-probabilities are over all "
        "of it: every importance ratio is off",
        cure=cure,
        found=lambda subject: is_truncated(sampling_of(subject)) and not carried(subject),
    )


def set_metrics(sizes: Tensor) -> dict[str, float]:
    """How much was left to sample from: flat names.

    Args:
        sizes: int64 `[n]`, of the sets of all sampled tokens.
    """
    return {
        "rollout/set_size_mean": float(sizes.double().mean()),
        "rollout/set_single_frac": float((sizes == 1).double().mean()),
    }


def of_sampled_tokens(completion: Any) -> list[dict[int, Any]]:
    """The log-probabilities of a `CompletionOutput` in vLLM's form, of its sampled tokens alone.

    Trainers that ask for one of a token would read text of all the others, or take the likeliest for the sampled one.
    """
    from vllm.logprobs import Logprob

    told = completion.logprobs
    if hasattr(told, "start_indices"):
        return [{told.token_ids[at]: Logprob(told.logprobs[at], told.ranks[at])} for at in told.start_indices]
    return [{token: entries[token]} for token, entries in zip(completion.token_ids, told, strict=True)]


@contextlib.contextmanager
def logits_over_sets(model: nn.Module, mask: SamplingMask | None) -> Iterator[None]:
    """Context in which `model`, called on rows `[B, S]`, gives logits of which only those of the sets are left.

    What a trainer makes of them (log-probabilities, entropy, at any temperature) is over the sets, gradients too.

    Args:
        model: called once for all rows; may give logits of the last n positions alone.
        mask: `[B, S]`, of the tokens themselves: logits are of the next. None for the whole vocabulary.

    Raises:
        ReplayError: a forward of other rows, or not one forward.
    """
    if mask is None:
        yield
        return
    following = mask.positions().roll(-1, 1)
    following[:, -1] = -1
    calls = 0

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        logits = output.logits
        if logits.dim() != 3 or len(logits) != len(following) or logits.shape[1] > following.shape[1]:
            raise ReplayError(
                f"logits over sets: expected those of rows {list(following.shape)}, or of their last positions, got "
                f"{list(logits.shape)}"
            )
        sets = mask.take(following[:, following.shape[1] - logits.shape[1] :])
        output.logits = _over_sets(logits, sets.to(logits.device))
        return output

    handle = model.register_forward_hook(cut)
    try:
        yield
        if calls != 1:
            raise ReplayError(f"logits over sets: expected one forward of the rows, got {calls}")
    finally:
        handle.remove()


def _over_sets(logits: Tensor, sets: SamplingMask) -> Tensor:
    """`[B, n, V]`, from logits and sets of the same positions; those without a set stay as they are."""
    sizes = sets.sizes.reshape(-1)
    taken_out = (sizes > 0)[:, None].repeat(1, logits.shape[-1])
    taken_out[torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes), sets.token_ids.long()] = False
    lowest = max(_TAKEN_OUT, torch.finfo(logits.dtype).min / 8)  # finite at a temperature of 1/8 too
    return logits.masked_fill(taken_out.view(logits.shape), lowest)
