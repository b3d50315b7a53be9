"""The weights of a live Hugging Face model under transformers' own names, through any wrappers."""

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import SyncError, summary
from r3.float32_weights import computes_in_float32, kept_in_float32
from r3.weight_sync.weights.gathering import placeholder
from r3.weight_sync.weights.lazy import (
    LazyWeight,
    SharedMaterialization,
    gathered,
    is_sharded,
)
from r3.weight_sync.weights.peft_merge import live_choice, merged, tuned_module
from r3.weight_sync.weights.row_blocks import RowBlock, gathered_block, row_blocks
from r3.wrappers import CHECKPOINTED, COMPILED, flattened, is_tuner

# Wrappers of one module: torch.compile, activation checkpointing.
_TRANSPARENT = (COMPILED, CHECKPOINTED)
# Wrappers of a whole model, from the outside in: these, DistributedDataParallel, and PEFT's two levels.
_AROUND = (*_TRANSPARENT, "module", "base_model", "model")
_FULL = (
    "Give WeightSync.push the trainer's own generator of (checkpoint name, full tensor), on every rank that gathers, "
    "or use fully_shard (FSDP2), or ZeRO-1 or 2"
)


@dataclass(frozen=True)
class _NamedWeight:
    """A weight in the module tree; `key` is the same for weights that are one tensor."""

    name: str
    key: Hashable
    source: LazyWeight


def hugging_face_model(model: nn.Module) -> tuple[Any, Any]:
    """The transformers model inside `model`, and the innermost FSDP module around it, or None.

    Raises:
        SyncError: there is none, or its weights are not where they can be read (FSDP1, DeepSpeed ZeRO-3, soft
        prompts).
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    if flattened(model):
        raise SyncError(f"{type(model).__name__}: weights in flat shards of FSDP1 cannot be read by name. {_FULL}")
    inner: nn.Module | None = model
    shard = None
    while inner is not None and not isinstance(inner, PreTrainedModel):
        config = getattr(inner, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise SyncError(f"{config.peft_type} trains a prompt, not weights: there is nothing that a sync could send")
        shard = inner if isinstance(inner, FSDPModule) else shard
        inner = next((inner._modules[name] for name in _AROUND if inner._modules.get(name) is not None), None)
    if inner is None:
        raise SyncError(f"model: expected a transformers model, plain or wrapped, got {type(model).__name__}")
    for name, parameter in inner.named_parameters():
        if "_flat_param" in name:
            raise SyncError(f"{name}: weights in flat shards of FSDP1 cannot be read by name. {_FULL}")
        if hasattr(parameter, "ds_id"):
            raise SyncError(f"{name}: weights that DeepSpeed ZeRO-3 has partitioned cannot be read by name. {_FULL}")
    return inner, shard


def live_weights(inner: Any, shard: Any, tied: dict[str, str], shapes: dict[str, torch.Size]) -> dict[str, LazyWeight]:
    """The weights that a checkpoint of `inner` would hold: parameters and persistent buffers, by name, tied ones once.

    Args:
        inner: a transformers model.
        shard: the innermost FSDP module around it, or None.
        tied: name -> name of the weight that it is tied to, as the configuration says.
        shapes: by name, as the configuration says.

    Raises:
        SyncError: weights that should be tied are two, or others are one; a weight is not whole.
    """
    _reshard(shard)
    keep = kept_in_float32(inner)
    ignored = set(getattr(inner, "_keys_to_ignore_on_save", None) or ())
    weights = [weight for weight in _walk(inner, "", shard, keep) if weight.name not in ignored]
    parts = [weight for weight in weights if weight.source.shape != shapes.get(weight.name, weight.source.shape)]
    if parts:
        raise SyncError(
            "weights have other shapes than the configuration says. Are they local shards? Expected whole weights or "
            "DTensors; under tensor parallelism transformers up to 5.15 has plain slices"
            + summary(f"{w.name}: expected {tuple(shapes[w.name])}, got {tuple(w.source.shape)}" for w in parts)
        )
    keys = {weight.name: weight.key for weight in weights}
    parted = [f"{n} and {of}" for n, of in tied.items() if n in keys and of in keys and keys[n] != keys[of]]
    if parted:
        raise SyncError(
            "weights that are one in the engine (tie_word_embeddings) are two in this model, perhaps because an "
            f"adapter or a wrapper parted them:{summary(parted)}\nKeep them tied, or train and serve them untied"
        )
    kept: dict[Hashable, _NamedWeight] = {}
    for weight in weights:
        before = kept.setdefault(weight.key, weight)
        if before is not weight and before.name in tied and weight.name not in tied:
            kept[weight.key] = weight
    lost = [f"{w.name} and {kept[w.key].name}" for w in weights if kept[w.key] is not w and w.name not in tied]
    if lost:
        raise SyncError(
            f"weights share a tensor, and the configuration does not say that they are tied:{summary(lost)}"
        )
    return {weight.name: weight.source for weight in weights if kept[weight.key] is weight}


def _walk(module: nn.Module, name: str, shard: Any, keep: re.Pattern) -> Iterator[_NamedWeight]:
    """The weights under `module`, which is called `name`; `shard` is the innermost FSDP module around it."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        shard = module
        _reshard(shard)
    inside = next((child for part in _TRANSPARENT if (child := module._modules.get(part)) is not None), None)
    inside = inside if inside is not None else live_choice(module)
    if inside is not None:
        yield from _walk(inside, name, shard, keep)
    elif is_tuner(module):
        yield from _merged(module, name, shard, keep)
    else:
        prefix = f"{name}." if name else ""
        for own, tensor in module._parameters.items():
            if tensor is not None:
                # What the forward rounds is sent rounded: the engine's router is then the trainer's.
                keeps = keep.search(prefix + own) is not None and computes_in_float32(shard)
                source = _source(prefix + own, tensor, _reader(module, own, shard), keeps)
                if blocks := row_blocks(tensor):
                    source = replace(source, blocks=blocks, make_block=_block_reader(module, own, shard))
                yield _NamedWeight(prefix + own, id(tensor), source)
        for own, tensor in module._buffers.items():
            if tensor is not None and own not in module._non_persistent_buffers_set:
                # Buffers that a checkpoint holds (the correction biases of routers) are never cast by FSDP's mixed
                # precision: the trainer computes with what is here, and vLLM declares them float32.
                yield _NamedWeight(
                    prefix + own, id(tensor), _source(prefix + own, tensor, _reader(module, own, shard), True)
                )
        for own, child in module._modules.items():
            if child is not None:
                yield from _walk(child, prefix + own, shard, keep)


def _merged(module: Any, name: str, shard: Any, keep: re.Pattern) -> Iterator[_NamedWeight]:
    """The weights of a layer with its active adapters merged."""
    bare = sorted(_walk(tuned_module(module), name, shard, keep), key=lambda weight: weight.name)
    own = [weight.name.removeprefix(f"{name}.") for weight in bare]

    def make() -> list[Tensor]:
        _reshard(shard)
        merged_module = merged(module, gathered)
        if merged_module is None:
            return [placeholder(weight.source.shape, weight.source.dtype) for weight in bare]
        return [attrgetter(path)(merged_module).detach() for path in own]

    together = SharedMaterialization(make)
    for index, weight in enumerate(bare):
        take = lambda index=index: together.take(index)
        source = weight.source
        # Two layers that share a weight no longer do when one of them is merged.
        yield _NamedWeight(
            weight.name,
            (id(module), index),
            LazyWeight(
                name=weight.name,
                shape=source.shape,
                dtype=source.dtype,
                make=take,
                keep_dtype=source.keep_dtype,
                together=(together,),
            ),
        )


def _source(name: str, tensor: Tensor, make: Callable[[], Tensor], keep_dtype: bool) -> LazyWeight:
    return LazyWeight(
        name=name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        make=make,
        keep_dtype=keep_dtype,
        live=tensor.is_contiguous() and not is_sharded(tensor),
    )


def _reader(module: nn.Module, own: str, shard: Any) -> Callable[[], Tensor]:
    def make() -> Tensor:
        _reshard(shard)
        return gathered(getattr(module, own))

    return make


def _block_reader(module: nn.Module, own: str, shard: Any) -> Callable[[RowBlock], Tensor]:
    def make_block(block: RowBlock) -> Tensor:
        _reshard(shard)
        return gathered_block(getattr(module, own), block)

    return make_block


def _reshard(shard: Any) -> None:
    """Reshard: after a forward FSDP2 may leave weights gathered, in the dtype of the computation."""
    if shard is not None:
        shard.reshard()
