"""Attention masks of whole rows from the gathered position ids, whatever slice of them the model sees."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from r3.errors import ParallelError
from r3.parallel.sequences import Sequences


def whole_mask(make: Callable, sequences: Sequences, *, implementation: str, config: Any, **kwargs: Any) -> Any:
    """What `make`, transformers' mask function of `implementation`, makes of all positions.

    Args:
        make: from transformers' `ALL_MASK_ATTENTION_FUNCTIONS`.
        sequences: of the whole rows `[B, S]`.
        kwargs: with which the model calls its mask function; what tells the length of its own slice is replaced.

    Raises:
        ParallelError: the model adds a mask of its own, or `implementation` cannot express the mask.
    """
    batch, length = sequences.position_ids.shape
    if kwargs.get("use_vmap"):
        raise ParallelError(
            f"{type(config).__name__} combines its causal mask with one of its own, which is known for this rank's "
            "slice alone"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if "flash" in implementation and chunk is not None and chunk < length:
        raise ParallelError(
            f"{implementation} cannot mask chunks: expected at most attention_chunk_size = {chunk} positions, got "
            f"{length}; use sdpa, eager or flex_attention"
        )
    whole = {"q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0, "attention_mask": None}
    if not sequences.one_a_row:
        kwargs["mask_function"] = within_sequences(kwargs["mask_function"], sequences.position_ids, sequences.index)
        kwargs["allow_is_causal_skip"] = False
    return make(**{**kwargs, **whole, "batch_size": batch, "config": config})


def within_sequences(mask_function: Callable, position_ids: Tensor, index: Tensor) -> Callable:
    """`mask_function` by position in the sequence, between positions of one sequence only."""

    def function(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same = index[batch, q] == index[batch, kv]
        return same & mask_function(batch, head, position_ids[batch, q], position_ids[batch, kv])

    return function
