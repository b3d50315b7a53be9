"""Small settings for the configuration keys that families have in common; each takes those that it knows."""

import dataclasses
from typing import Any

VOCAB, HIDDEN, SCALE = 64, 32, 1.7

_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
_TOP_K = dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2)
_SCALES = dict.fromkeys(
    (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_router_scaling_factor",
        "moe_routed_scaling_factor",
    ),
    SCALE,
)
_SHARED = dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1) | dict.fromkeys(
    (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
        "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    16,
)
_DENSE_FIRST = dict(
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_dense_layers=1,
    moe_layer_start_index=1,
    mlp_layer_types=["dense", "sparse", "sparse"],
    mlp_only_layers=[0],
)
_ATTENTION = dict(
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    sliding_window=8,
    attention_dropout=0.0,
    index_topk=4,
    index_n_heads=2,
    index_head_dim=16,
    linear_head_dim=16,
    linear_num_heads=2,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
TEXT = {
    **_EXPERTS,
    **_TOP_K,
    **_SCALES,
    **_SHARED,
    **_DENSE_FIRST,
    **_ATTENTION,
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "use_cache": False,
}
# Towers for pictures and sound are built and never run.
TOWER = dict(
    hidden_size=32,
    d_model=32,
    intermediate_size=32,
    encoder_ffn_dim=32,
    mlp_dim=32,
    depth=1,
    num_hidden_layers=1,
    encoder_layers=1,
    num_heads=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    encoder_attention_heads=2,
    head_dim=16,
    out_hidden_size=32,
    text_hidden_size=32,
    output_dim=32,
    output_proj_dims=32,
    vision_output_dim=32,
    projector_input_dim=32,
    projector_output_dim=32,
    projection_hidden_dim=32,
    projection_intermediate_size=32,
    adapter_in_dim=32,
    adapter_out_dim=32,
    adapter_input_size=32,
    downsample_hidden_size=8,
    downsample_channels=[8, 8],
    output_channels=8,
    num_mel_bins=16,
    image_size=28,
    patch_size=4,
    num_position_embeddings=16,
    position_embedding_size=16,
    pooling_kernel_size=1,
    posemb_grid_size=4,
    deepstack_visual_indexes=[0],
    global_attn_indexes=[0],
    mlp_layer_types=["dense"],
    vocab_size=8,
)


def _known(cls: type, table: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in table.items() if name in names}


def _sub_configs(cls: type) -> dict[str, type]:
    """By name, the classes that a default configuration takes: some are declared as "any" (AutoConfig)."""
    names = getattr(cls, "sub_configs", None) or {}
    default = cls() if names else None
    found = {name: type(getattr(default, name, None)) for name in names}
    return {name: sub for name, sub in found.items() if dataclasses.is_dataclass(sub)}


def _typed(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """As in a saved configuration: some families read a part as this class only if it says so."""
    return {"model_type": cls.model_type} | settings


def _tower(cls: type) -> dict[str, Any]:
    return _typed(cls, _known(cls, TOWER) | {name: _tower(sub) for name, sub in _sub_configs(cls).items()})


def build_config(cls: type, text: dict[str, Any], parts: dict[str, Any], sizes: dict[str, Any] | None = None) -> Any:
    """A configuration of `cls`: the common settings that it knows, then `text` for the decoder, then `parts`.

    `sizes` are common settings in place of those here.

    A part that is a dictionary is merged into the settings of the sub-configuration of that name.
    """
    subs = _sub_configs(cls)
    common = TEXT | (sizes or {})
    if "text_config" not in subs:
        return cls(**_known(cls, common) | text | parts)
    settings = {name: _tower(sub) for name, sub in subs.items()}
    settings["text_config"] = _typed(subs["text_config"], _known(subs["text_config"], common) | text)
    for name, part in parts.items():
        settings[name] = settings.get(name, {}) | part if isinstance(part, dict) else part
    return cls(**_known(cls, {"tie_word_embeddings": False}) | settings)
