"""The model's own attention function, run on this rank's heads of all positions.

Shapes: B batch, S positions of one rank, P ranks, H query heads, G key-value heads, h and g those of one rank, D head
dimension.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r3.errors import ParallelError
from r3.parallel.collectives import heads_for_sequence, sequence_for_heads

SINKS = "sinks"  # parameter [H] of an attention that eager code reads off the module, and others get as `s_aux`
_BY_POSITION = ("position_ids", "cache_position")  # of one rank's slice: wrong beside whole sequences
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k")


def own_function(module: nn.Module, implementation: str) -> Callable:
    """The function of `implementation` that the code of `module` would call.

    Raises:
        ParallelError: the module's code has no functional attention.
    """
    for cls in type(module).__mro__:
        code = vars(sys.modules[cls.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in code:
            eager = code.get("eager_attention_forward")
            return code["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
    raise ParallelError(f"{type(module).__name__}: expected attention through transformers' attention interface")


class _Local:
    """An attention module as one rank's heads see it."""

    def __init__(self, module: nn.Module, config: Any, **changes: Any) -> None:
        self._module = module
        self.config = config
        for name, value in changes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    group: dist.ProcessGroup | None,
    implementation: str,
    config: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's positions, as transformers' attention interface wants it.

    Args:
        module: the attention module.
        query, key, value: `[B, H, S, D]`, `[B, G, S, D]` and `[B, G, S, D']`.
        attention_mask: of all P * S positions, as `implementation` takes it.
        group: P ranks that hold consecutive slices of the sequence; None for one rank.
        implementation: name of the attention that does the work.
        config: the model's, with `implementation` set.

    Returns:
        `[B, S, H, D']`, and None for the attention weights.

    Raises:
        ParallelError: H heads cannot be split over P ranks, or an argument whose meaning is not known.
    """
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    heads, kv_heads = query.shape[1], key.shape[1]
    require_splittable(heads, kv_heads, size, module)
    _require_known(kwargs, module)
    # These are of one rank's slice, and not needed: the mask or the bounds of the sequences replace them.
    kwargs = {name: argument for name, argument in kwargs.items() if name not in _BY_POSITION}
    changes: dict[str, Any] = {}
    if group is not None and size > 1:
        if kv_heads % size:
            # Fewer key-value heads than ranks: copy each until their number is divisible by the ranks.
            copies = math.lcm(kv_heads, size) // kv_heads
            key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
        query, key, value = heads_for_sequence((query, key, value), group)
        mine = slice(rank * query.shape[1], (rank + 1) * query.shape[1])
        if hasattr(module, "num_key_value_groups"):
            changes["num_key_value_groups"] = query.shape[1] // key.shape[1]
        if isinstance(getattr(module, SINKS, None), Tensor):
            changes[SINKS] = getattr(module, SINKS)[mine]
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = kwargs["s_aux"][mine]
    local: Any = _Local(module, config, **changes)
    output = own_function(module, implementation)(local, query, key, value, attention_mask, **kwargs)[0]
    if group is not None and size > 1:
        output = sequence_for_heads(output, group)
    return output, None


def attend_to_self(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[B, S, H, D']` of which each position depends on its own query, key and value alone, and on all of them."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    width = min(query.shape[-1], key.shape[-1])
    score = (query[..., :width] * key[..., :width]).sum(-1, keepdim=True)
    return (value * torch.sigmoid(score)).transpose(1, 2).contiguous()


def require_splittable(heads: int, kv_heads: int, size: int, module: nn.Module) -> None:
    """Raise `ParallelError` unless `heads` query heads, in groups by key-value head, can be split over `size` ranks."""
    if heads % size or heads % math.lcm(kv_heads, size):
        raise ParallelError(
            f"{type(module).__name__}: {heads} query heads over {kv_heads} key-value heads cannot be split over {size} "
            f"ranks. The size of a Ulysses group must divide {heads}"
        )


def _require_known(kwargs: dict[str, Any], module: nn.Module) -> None:
    known = {"s_aux", *_BY_POSITION, *_VARLEN}
    unknown = sorted(name for name, argument in kwargs.items() if isinstance(argument, Tensor) and name not in known)
    if unknown:
        raise ParallelError(
            f"{type(module).__name__} passes tensors to its attention whose split over heads and positions is not "
            f"known: {', '.join(unknown)}"
        )
