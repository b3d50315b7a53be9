"""Stand-ins, for these tests only, with which SkyRL imports on a CPU and under Python 3.11, which its metadata refuses.

Nothing of SkyRL is replaced: `flash_attn.bert_padding`, where that package is not there, is written in plain torch,
and `typing.TypedDict` is the newer one, because pydantic refuses the older. Import this before anything of SkyRL.
"""

import contextlib
import importlib.util
import sys
import types
import typing

import torch
import typing_extensions

if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict


def unpad_input(hidden_states, attention_mask):
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices] = hidden_states
    return out.unflatten(0, (batch, seqlen))


if importlib.util.find_spec("flash_attn") is None:
    # The module alone, without its package: transformers would take flash attention to be there.
    _padding = types.ModuleType("flash_attn.bert_padding")
    _padding.unpad_input, _padding.pad_input = unpad_input, pad_input
    sys.modules["flash_attn.bert_padding"] = _padding


def methods_on_cpu(patch=setattr) -> None:
    """SkyRL's worker methods name CUDA: as its own CPU tests do, this says CPU and no autocast. `patch(owner, name,
    value)`."""
    patch(torch.cuda, "current_device", lambda: torch.device("cpu"))
    patch(torch, "autocast", lambda **kwargs: contextlib.nullcontext())
