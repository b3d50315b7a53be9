"""Attention masks of whole rows from the gathered position ids, whatever slice of them the model sees."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import masking_utils

from r3.errors import ParallelError
from r3.parallel.sequence_slices import Sequences

_BLOCKS, _CHUNKS = "blockwise_overlay", "chunked_overlay"  # of transformers.masking_utils


def whole_mask(
    make: Callable, sequences: Sequences, *, whole: bool, implementation: str, config: Any, **kwargs: Any
) -> Any:
    """The mask of all positions, from `make`, transformers' mask function of `implementation`.

    Args:
        make: from transformers' `ALL_MASK_ATTENTION_FUNCTIONS`.
        sequences: of the whole rows `[B, S]`.
        whole: whether the model sees whole rows where it calls its mask function.
        kwargs: arguments of the model's call of its mask function; those that depend on its slice's length are
            replaced.

    Raises:
        ParallelError: the model adds a mask of its own, or `implementation` cannot express the mask.
    """
    batch, length = sequences.position_ids.shape
    patterns = {function.__qualname__.partition(".")[0] for function in _patterns(kwargs["mask_function"])}
    foreign = any(function.__module__ != masking_utils.__name__ for function in _patterns(kwargs["mask_function"]))
    if (kwargs.get("use_vmap") or _BLOCKS in patterns) and (foreign or not whole):
        raise ParallelError(
            f"{type(config).__name__} combines its causal mask with one of its own, which is known for this rank's "
            "slice alone"
        )
    if "flash" in implementation and _BLOCKS in patterns:
        raise ParallelError(
            f"{implementation} cannot mask images whose tokens see each other whole; use sdpa, eager or flex_attention"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if "flash" in implementation and chunk is not None and chunk < length:
        raise ParallelError(
            f"{implementation} cannot mask chunks: expected at most attention_chunk_size = {chunk} positions, got "
            f"{length}; use sdpa, eager or flex_attention"
        )
    all_positions = {"q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0, "attention_mask": None}
    if not sequences.one_a_row:
        positions = sequences.position_ids if _CHUNKS in patterns else None
        kwargs["mask_function"] = within_sequences(kwargs["mask_function"], positions, sequences.index)
        kwargs["allow_is_causal_skip"] = False
    return make(**{**kwargs, **all_positions, "batch_size": batch, "config": config})


def within_sequences(mask_function: Callable, position_ids: Tensor | None, index: Tensor) -> Callable:
    """`mask_function` between positions of one sequence only.

    Args:
        position_ids: `[B, S]`, by which it is asked. None for positions in the row: causal and sliding masks look at
            their difference alone, and the blocks of images are found by them.
        index: `[B, S]`, number of each position's sequence.
    """

    def function(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same = index[batch, q] == index[batch, kv]
        if position_ids is not None:
            q, kv = position_ids[batch, q], position_ids[batch, kv]
        return same & mask_function(batch, head, q, kv)

    return function


def _patterns(mask_function: Any) -> list[Any]:
    """The mask functions of which `mask_function` is combined."""
    held = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for value in held for part in (value if isinstance(value, tuple) else (value,)) if callable(part)]
    return [pattern for part in parts for pattern in _patterns(part)] if parts else [mask_function]
