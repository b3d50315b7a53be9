"""The trainer's weights, as vLLM's `load_weights` understands them.

    sync.push(named_weights(model), version=1)

Names, shapes and dtypes are known at once; each tensor is materialised when it is sent. Works with plain models and
with the wrappers of training, in any order: FSDP2 (DTensor), torch.compile, activation checkpointing, PEFT,
DistributedDataParallel. Weights that transformers fuses are split again by transformers' own code (`checkpoint_names`),
adapters are merged by PEFT's own code (`peft_merge`).
"""

import copy
from typing import Any

import torch
from torch import nn

from r3.errors import SyncError
from r3.weight_sync.weights.adapter import AdapterWeights, adapter_weights
from r3.weight_sync.weights.checkpoint_names import checkpoint_weights, published_conversions
from r3.weight_sync.weights.lazy import LazyWeight, Weight, gathered
from r3.weight_sync.weights.live import hugging_face_model, live_weights
from r3.weight_sync.weights.text_part import whole_of
from r3.wrappers import original_class

__all__ = ["AdapterWeights", "LazyWeight", "Weight", "adapter_weights", "gathered", "named_weights"]


def named_weights(model: nn.Module, *, fused_experts: bool = False) -> list[tuple[str, LazyWeight]]:
    """All weights of `model` under the names, and in the shapes, of its Hugging Face checkpoint.

    - Names and shapes are those of the published checkpoint, also where `save_pretrained` writes others (Qwen3-VL-MoE).
    - The text part of a model with vision (`model.model.language_model`) has the names that it has in the whole one, if
      its family has only that. To leave out vision see `WeightSync.push`, `frozen`.
    - Tied weights come once, under the name that the checkpoint has.
    - Persistent buffers come too (correction biases of routers), others do not (rotary tables).
    - PEFT adapters are merged into what is sent, exactly as `merge_and_unload` would; the model itself keeps them
      apart. To send only an adapter see `adapter_weights`.
    - `LazyWeight.keep_dtype` is set for buffers, and for what transformers itself keeps in float32 (the gates of many
      routers) if the trainer computes with float32: rounding these would change which experts are chosen. All other
      weights may be cast, and so may those that FSDP2 casts for the forward (`MixedPrecisionPolicy(param_dtype=...)`):
      the trainer computes with cast ones too, and both sides have the same router.

    One weight is held whole at a time. For weights that are cut out of one tensor (experts), or merged together, that
    is the tensor that they are cut from; a view of it keeps it in memory. Of experts that expert parallelism spreads
    over ranks, it is those of one rank.

    The list can be sent again after each step of the optimizer. It must be iterated in order, from the start, and on
    every rank of the mesh where the model is sharded.

    Args:
        model: a transformers model, plain or wrapped.
        fused_experts: send `experts.gate_up_proj` `[E, 2I, H]` and `experts.down_proj` `[E, H, I]` as they are, where
            the checkpoint differs only by having them apart: far fewer names. vLLM takes both forms for Qwen2-MoE,
            Qwen3-MoE, OLMoE, GLM-4-MoE and ERNIE 4.5 (tested with the models of vLLM 0.30), but not for DeepSeek-V2
            and V3, whose sync then fails. Has no effect on families whose checkpoints are fused anyway (gpt-oss) or
            name experts differently (Mixtral). `LazyWeight.parts` has the names of the checkpoint.

    Raises:
        SyncError: no transformers model; weights that cannot be read where they are (FSDP1, ZeRO-3); weights that the
            engine holds as one are two; adapters that cannot be merged.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> weights = dict(named_weights(AutoModelForCausalLM.from_pretrained("examples/chain_sum_moe")))
        >>> weights["model.norm.weight"].dtype
        torch.bfloat16
    """
    inner, shard = hugging_face_model(model)
    skeleton = _skeleton(inner)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    live = live_weights(inner, shard, dict(skeleton.all_tied_weights_keys), shapes)
    if (whole_model := whole_of(inner)) is not None:
        skeleton, path = whole_model
        skeleton._weight_conversions = published_conversions(skeleton, None)
        live = {path + name: source for name, source in live.items()}
    return checkpoint_weights(skeleton, live, fused_experts)


def _skeleton(inner: Any) -> Any:
    """The model without data and wrappers: transformers looks up its conversions by class and module path."""
    if getattr(inner, "hf_quantizer", None) is not None:
        raise SyncError(f"{type(inner).__name__} is quantised: expected full-precision weights to train and send")
    with torch.device("meta"):
        skeleton = original_class(inner)(copy.deepcopy(inner.config))  # type: ignore[call-arg]
    skeleton._weight_conversions = published_conversions(skeleton, getattr(inner, "_weight_conversions", None))
    return skeleton
