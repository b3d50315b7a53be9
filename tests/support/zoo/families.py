"""Every mixture-of-experts family, a line each: its class, what its configuration needs, its router and its formula."""

from typing import Any

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers.models.aria import modeling_aria
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

from zoo import observers
from zoo.case import BOTH, Case
from zoo.config import HIDDEN, SCALE
from zoo.formulas import (
    Formula,
    Gemma4Formula,
    InklingFormula,
    ZayaFormula,
    sigmoid,
    softmax,
    softmax_of_chosen,
    sqrt_softplus,
)

_ALL: dict[str, Case] = {}


def _add(name: str, architecture: str, formula: Any = None, text: dict[str, Any] | None = None, **rest: Any) -> None:
    if name in _ALL:
        raise ValueError(f"{name} is listed twice")
    _ALL[name] = Case(name=name, architecture=architecture, formula=formula, text=text or {}, **rest)


# Every decoder layer is a mixture of experts.
SPARSE = dict(num_layers=2, router_layers=(0, 1))
TWO = dict(num_hidden_layers=2)
# Where the router is.
ROUTER = dict(router="model.layers.{}.mlp.router")
VL_GATE = dict(router="model.language_model.layers.{}.mlp.gate")
GRANITE = dict(router="model.layers.{}.block_sparse_moe.router")
SORTED = dict(observer=observers.by_expert, experts=("eager",))
LLAMA4 = dict(router="model.layers.{}.feed_forward.router", observer=observers.llama4, experts=("eager",))
# Formulas with many users.
PLAIN_SOFTMAX = Formula(score=softmax)
NORM_SOFTMAX = Formula(score=softmax, norm=1)
CHOSEN = Formula(score=softmax_of_chosen)
CHOSEN_OF_LAYER = Formula(score=softmax_of_chosen, weight="layer.weight")
NORM_SIGMOID = Formula(score=sigmoid, norm=1, eps=1e-20)
DEEPSEEK_V2 = Formula(score=softmax, scale=SCALE)
DEEPSEEK_V3 = Formula(score=sigmoid, norm=1, eps=1e-20, scale=SCALE)
DEEPSEEK_V4 = Formula(score=sqrt_softplus, norm=1, eps=1e-20, scale=SCALE)
ERNIE = Formula(score=softmax, norm=1, least=1e-12)
# Settings that several families share.
_SMALL_TOWER = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=16,
    image_size=28,
    patch_size=14,
)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]})

_add(
    "afmoe", "AfmoeForCausalLM", Formula(score=sigmoid, norm=1, eps=1e-20, scale=SCALE, weight="gate.weight"), **ROUTER
)

# aria: its experts choose for themselves until some release between transformers 5.17 and 5.23.
_aria = (
    {} if hasattr(modeling_aria, "AriaTextTopKRouter") else dict(observer=observers.inside_experts, experts=("eager",))
)
_add(
    "aria",
    "AriaForConditionalGeneration",
    CHOSEN,
    TWO,
    parts=dict(vision_config=dict(model_type="idefics3_vision") | _SMALL_TOWER, projector_patch_to_query_dict={4: 4}),
    router="model.language_model.layers.{}.mlp.router",
    **SPARSE,
    **_aria,
)
_add("aria_text", "AriaTextForCausalLM", CHOSEN, TWO, **SPARSE, **ROUTER, **_aria)

_add("axk1", "AXK1ForCausalLM", DEEPSEEK_V3)
_add("axk2", "AXK2ForCausalLM", DEEPSEEK_V3)
_add("axk2-no_groups", "AXK2ForCausalLM", DEEPSEEK_V3, dict(n_group=None, topk_group=None))
_add("bailing_hybrid", "BailingHybridForCausalLM", DEEPSEEK_V3)
_add("beam", "BeamForCausalLM", NORM_SIGMOID)
_cohere2 = dict(logit_scale=1.0)
_add("cohere2_moe", "Cohere2MoeForCausalLM", CHOSEN, _cohere2)
_add(
    "cohere2_moe-sigmoid",
    "Cohere2MoeForCausalLM",
    Formula(score=sigmoid, norm=1),
    _cohere2 | dict(expert_selection_fn="sigmoid"),
)


def _dbrx(norm: float) -> dict[str, Any]:
    return dict(
        d_model=HIDDEN,
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(
            hidden_size=HIDDEN,
            ffn_hidden_size=16,
            moe_num_experts=8,
            moe_top_k=2,
            moe_normalize_expert_weights=norm,
            ffn_act_fn={"name": "silu"},
        ),
    )


for _name, _norm in (("dbrx", 1.0), ("dbrx-l2", 2.0)):
    _add(
        _name,
        "DbrxForCausalLM",
        Formula(score=softmax, norm=_norm, weight="layer.weight"),
        _dbrx(_norm),
        router="transformer.blocks.{}.ffn.router",
        experts=("eager",),
        **SPARSE,
    )

# Two groups out of four, as elsewhere, never bind with K = 2: the best two experts are in the best two groups.
_groups = dict(topk_method="group_limited_greedy", n_group=2, topk_group=1)
_add("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", DEEPSEEK_V2, **VL_GATE)
_add("deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK_V2)
_add("deepseek_ocr2-group_limited", "DeepseekOcr2ForConditionalGeneration", DEEPSEEK_V2, _groups, **VL_GATE)
_add("deepseek_v2-group_limited", "DeepseekV2ForCausalLM", DEEPSEEK_V2, _groups)
_add("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_V3)
_add(
    "deepseek_v3-not_normalised",
    "DeepseekV3ForCausalLM",
    Formula(score=sigmoid, scale=SCALE),
    dict(norm_topk_prob=False),
)
_add("deepseek_v3-one_group", "DeepseekV3ForCausalLM", DEEPSEEK_V3, dict(n_group=1, topk_group=1))
_add("deepseek_v32", "DeepseekV32ForCausalLM", DEEPSEEK_V3)

_v4 = dict(
    num_key_value_heads=1,
    mlp_layer_types=["moe"] * 3,
    layer_types=["sliding_attention"] * 3,
    o_groups=2,
    o_lora_rank=8,
    hc_mult=2,
)
_v4_hash = _v4 | dict(mlp_layer_types=["hash_moe", "moe", "moe"])
_v4_sigmoid = _v4 | dict(scoring_func="sigmoid")
_norm = modeling_deepseek_v4.DeepseekV4RMSNorm(4)
# Its norms stay in float32, and in transformers 5.17 they pass that on to projections in bfloat16, which fail.
_v4_dtypes = BOTH if _norm(torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.bfloat16 else (torch.float32,)
_v4_rest = dict(dtypes=_v4_dtypes, router_layers=(0, 1, 2))
_add("deepseek_v4", "DeepseekV4ForCausalLM", DEEPSEEK_V4, _v4, **_v4_rest)
_add("deepseek_v4-hash", "DeepseekV4ForCausalLM", DEEPSEEK_V4, _v4_hash, dtypes=_v4_dtypes)
_add("deepseek_v4-sigmoid", "DeepseekV4ForCausalLM", DEEPSEEK_V3, _v4_sigmoid, **_v4_rest)

_add(
    "diffusion_gemma",
    "DiffusionGemmaForBlockDiffusion",
    text=TWO,
    parts=dict(
        canvas_length=4, vision_config=dict(_SMALL_TOWER, model_type="gemma4_vision", position_embedding_size=16)
    ),
    refused="denoises a block of tokens in several passes: there is no one routing per token",
)
_add(
    "doge",
    "DogeForCausalLM",
    text=dict(is_moe=True, num_experts=16, num_hidden_layers=2),
    refused="product keys: two choices among half-keys, no router",
)
_add("dots1", "Dots1ForCausalLM", DEEPSEEK_V3)
_dots3 = dict(layer_types=["full_attention"] * 3)
_add("dots3_note", "Dots3NoteForConditionalGeneration", DEEPSEEK_V3, _dots3, **VL_GATE)
_add("dots3_note_text", "Dots3NoteForCausalLM", DEEPSEEK_V3, _dots3)
_add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", ERNIE)
_add(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeForConditionalGeneration",
    ERNIE,
    dict(moe_intermediate_size=[16, 16], rope_parameters=MROPE["rope_parameters"] | dict(mrope_section=[3, 3, 2])),
    router="model.language_model.layers.{}.mlp.text_moe.gate",
)
_add("exaone_moe", "ExaoneMoeForCausalLM", DEEPSEEK_V3)
_add("flex_olmo", "FlexOlmoForCausalLM", NORM_SOFTMAX, TWO, **SPARSE)
_add("flint", "FlintForCausalLM", Formula(score=sigmoid, norm=1))

_gemma4 = dict(
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    enable_moe_block=True,
    hidden_size_per_layer_input=0,
)
# gemma4: the router's input is scaled by H**-0.5.
_gemma4_rest = dict(gain=1.5 * HIDDEN**0.5, **SPARSE)
_add(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    Gemma4Formula(),
    _gemma4,
    router="model.language_model.layers.{}.router",
    **_gemma4_rest,
)
_add("gemma4_text", "Gemma4ForCausalLM", Gemma4Formula(), _gemma4, router="model.layers.{}.router", **_gemma4_rest)

_add("glm4_moe", "Glm4MoeForCausalLM", DEEPSEEK_V3)
_add("glm4_moe_lite", "Glm4MoeLiteForCausalLM", DEEPSEEK_V3)
_add(
    "glm4v_moe",
    "Glm4vMoeForConditionalGeneration",
    DEEPSEEK_V3,
    # Half of each head rotates here.
    dict(rope_parameters=MROPE["rope_parameters"] | dict(mrope_section=[2, 1, 1])),
    **VL_GATE,
)
_add(
    "glm5_next",
    "Glm5NextForConditionalGeneration",
    DEEPSEEK_V3,
    dict(qk_rope_head_dim=0, head_dim=0, index_kpool=2),
    **VL_GATE,
)
_add("glm_moe_dsa", "GlmMoeDsaForCausalLM", DEEPSEEK_V3)
_add("gpt_oss", "GptOssForCausalLM", Formula(score=softmax_of_chosen, bias="bias"), TWO, **SPARSE, **ROUTER)
# Granite sorts tokens by expert, as JetMoE does, before transformers 5.13.
_granite = CHOSEN
if hasattr(modeling_granitemoe, "GraniteMoeTopKGating"):
    _granite, GRANITE = CHOSEN_OF_LAYER, GRANITE | SORTED
_add("granitemoe", "GraniteMoeForCausalLM", _granite, TWO, **SPARSE, **GRANITE)
_add("granitemoe_swa", "GraniteMoeSWAForCausalLM", _granite, TWO, **SPARSE, **GRANITE)
_add(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    _granite,
    dict(TWO, mamba_n_heads=4, mamba_d_state=8),
    **SPARSE,
    **GRANITE,
)
_add("granitemoeshared", "GraniteMoeSharedForCausalLM", _granite, TWO, **SPARSE, **GRANITE)
_add("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", Formula(score=softmax, norm=1, weight="wg.weight"), TWO, **SPARSE)
_add("hy_v3", "HYV3ForCausalLM", DEEPSEEK_V3)
_add("hy_v4", "HYV4ForCausalLM", DEEPSEEK_V3)
_add(
    "hy_v4_vl",
    "HYV4VLForConditionalGeneration",
    DEEPSEEK_V3,
    # 8 dimensions of a head rotate.
    dict(rope_parameters=MROPE["rope_parameters"] | dict(mrope_section=[2, 1, 1])),
    **VL_GATE,
)

_inkling = dict(
    swa_num_attention_heads=2,
    swa_num_key_value_heads=2,
    swa_head_dim=16,
    d_rel=4,
    rel_extent=8,
    sliding_window_size=8,
    logits_mup_width_multiplier=1.0,
)
_inkling_formula = InklingFormula(scale=SCALE, shared=2)
_inkling_text = _inkling | dict(n_shared_experts=2)
_add(
    "inkling",
    "InklingForConditionalGeneration",
    _inkling_formula,
    _inkling_text,
    # As many layers as the picture can be folded: fewer are planned with scipy.
    parts=dict(vision_config=dict(num_hidden_layers=4, patch_size=4)),
    seed=2,
    **VL_GATE,
)
_add("inkling_text", "InklingForCausalLM", _inkling_formula, _inkling_text, seed=2)
_inkling2 = {k: v for k, v in _inkling.items() if k != "logits_mup_width_multiplier"} | TWO
_add("inkling2", "Inkling2ForConditionalGeneration", DEEPSEEK_V3, _inkling2, **VL_GATE, **SPARSE)
_add("inkling2_text", "Inkling2ForCausalLM", DEEPSEEK_V3, _inkling2, **SPARSE)
# Of one pass: attach refuses a decoder that runs its layers several times.
_loop = _inkling2 | dict(
    n_layers_per_attn_res_block=1,
    loop_layer_index_start=1,
    loop_layer_index_end=2,
    loop_num_passes=1,
    loop_gate_rank=4,
)
_add("inkling2_loop", "Inkling2LoopForConditionalGeneration", DEEPSEEK_V3, _loop, **VL_GATE, **SPARSE)
_add("inkling2_loop_text", "Inkling2LoopForCausalLM", DEEPSEEK_V3, _loop, **SPARSE)

_add(
    "jamba",
    "JambaForCausalLM",
    PLAIN_SOFTMAX,
    dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=0, mamba_d_state=4, use_mamba_kernels=False),
    router="model.layers.{}.feed_forward.router",
    num_layers=4,
    router_layers=(1, 3),
)
_add(
    "jetmoe",
    "JetMoeForCausalLM",
    CHOSEN_OF_LAYER,
    dict(TWO, kv_channels=16, num_key_value_heads=1),
    **SORTED,
    **SPARSE,
    **ROUTER,
)
_add("kimi_linear", "KimiLinearForCausalLM", DEEPSEEK_V3)
# kolibri1: the correction is of logits, not of probabilities.
_add("kolibri1", "Kolibri1ForCausalLM", Formula(score=sigmoid, norm=1), TWO, correction=1.0, **SPARSE)
_add("laguna", "LagunaForCausalLM", Formula(score=sigmoid, norm=1))
_add(
    "laguna-softcap",
    "LagunaForCausalLM",
    Formula(score=sigmoid, norm=1, softcap=2.0),
    dict(moe_router_logit_softcapping=2.0),
)
_add(
    "lara_mini",
    "LaraMiniForCausalLM",
    NORM_SOFTMAX,
    dict(TWO, layer_types=["linear_attention", "full_attention"]),
    **SPARSE,
)
_lfm2 = dict(layer_types=["conv", "full_attention", "conv"])
_lfm2_router = dict(router="model.layers.{}.feed_forward.gate")
_lfm2_formula = Formula(score=sigmoid, norm=1, eps=1e-6, scale=SCALE)
_add("lfm2_moe", "Lfm2MoeForCausalLM", _lfm2_formula, _lfm2, **_lfm2_router)
_add(
    "lfm2_moe-no_bias",
    "Lfm2MoeForCausalLM",
    _lfm2_formula,
    _lfm2 | dict(use_expert_bias=False),
    seed=15,
    **_lfm2_router,
)

_llama4 = dict(moe_layers=[1, 2], intermediate_size_mlp=48)
_llama4_vl = LLAMA4 | dict(router="language_model.model.layers.{}.feed_forward.router")
_add("llama4", "Llama4ForConditionalGeneration", Formula(score=sigmoid), _llama4, **_llama4_vl)
_add("llama4_text", "Llama4ForCausalLM", Formula(score=sigmoid), _llama4, **LLAMA4)
_add(
    "llama4_text-top1",
    "Llama4ForCausalLM",
    Formula(score=sigmoid),
    _llama4 | dict(num_experts_per_tok=1),
    top_k=1,
    seed=2,
    **LLAMA4,
)
_add(
    "longcat_flash",
    "LongcatFlashForCausalLM",
    Formula(score=softmax, scale=SCALE, weight="classifier.weight"),
    dict(num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=16, head_dim=8, zero_expert_num=4),
    num_experts=12,
    experts=("eager",),
    **SPARSE,
    **ROUTER,
)
_add("mellum", "MellumForCausalLM", NORM_SOFTMAX, seed=2)
_add("mimo_v2_flash", "MiMoV2FlashForCausalLM", DEEPSEEK_V3, dict(num_key_value_heads=1))
_add("minimax", "MiniMaxForCausalLM", NORM_SOFTMAX, TWO, **SPARSE)
_add("minimax_m2", "MiniMaxM2ForCausalLM", Formula(score=sigmoid, norm=1), TWO, **SPARSE)
_m3 = dict(index_block_size=4, index_topk_blocks=2, dense_intermediate_size=48, rotary_dim=8)
_add(
    "minimax_m3_vl",
    "MiniMaxM3SparseForConditionalGeneration",
    Formula(score=sigmoid, norm=1),
    _m3,
    parts=dict(projector_hidden_size=32),
    **VL_GATE,
)
_add("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", Formula(score=sigmoid, norm=1), _m3)
_mistral4 = Formula(score=softmax, norm=1, eps=1e-20, scale=SCALE)
_add("mistral4", "Mistral4ForCausalLM", _mistral4)
_add(
    "mistral_large4",
    "MistralLarge4ForConditionalGeneration",
    _mistral4,
    parts=dict(vision_config=dict(model_type="pixtral") | _SMALL_TOWER),
    **VL_GATE,
)
_add("mixtral", "MixtralForCausalLM", NORM_SOFTMAX, TWO, **SPARSE)
_add(
    "muse_spark",
    "MuseSparkForConditionalGeneration",
    Formula(score=sigmoid, norm=1, eps=1e-15, scale=SCALE, multiplier=0.7),
    dict(output_multiplier=0.7, moe_hidden_size=16),
    parts=dict(
        audio_config=dict(num_hidden_layers=1, patch_sizes=[4], hidden_sizes=[8], depths=[1]),
        out_hidden_size=32,
        projector_hidden_size=32,
    ),
    **VL_GATE,
)

_nemotron = dict(
    layers_block_type=["mamba", "moe", "attention", "moe"],
    ssm_state_size=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    chunk_size=4,
    use_mamba_kernels=False,
)
_nemotron_rest = dict(router="model.layers.{}.mixer.gate", num_layers=4, router_layers=(1, 3))
_add("nemotron_h", "NemotronHForCausalLM", DEEPSEEK_V3, _nemotron, **_nemotron_rest)
_add("nemotron_h-latent", "NemotronHForCausalLM", DEEPSEEK_V3, _nemotron | dict(moe_latent_size=16), **_nemotron_rest)


def _decoder(ids: Tensor) -> dict[str, Tensor]:
    return dict(decoder_input_ids=ids)


_add(
    "nllb_moe",
    "NllbMoeForConditionalGeneration",
    text=dict(
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    ),
    keywords=_decoder,
    refused="experts of limited capacity: other tokens decide what a token gets",
)
_add("olmoe", "OlmoeForCausalLM", NORM_SOFTMAX, TWO, **SPARSE)
_add("olmoe-not_normalised", "OlmoeForCausalLM", PLAIN_SOFTMAX, dict(TWO, norm_topk_prob=False), **SPARSE)
_add("phimoe", "PhimoeForCausalLM", text=TWO, refused="sampled in training, with weights that depend on the draw")
_add("qwen2_moe", "Qwen2MoeForCausalLM", NORM_SOFTMAX)
_add("qwen2_moe-not_normalised", "Qwen2MoeForCausalLM", PLAIN_SOFTMAX, dict(norm_topk_prob=False))
_qwen35 = dict(TWO, layer_types=["linear_attention", "full_attention"])
_qwen35_vl = _qwen35 | MROPE
_add("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", NORM_SOFTMAX, _qwen35_vl, seed=2, **VL_GATE, **SPARSE)
_add("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", NORM_SOFTMAX, _qwen35, **SPARSE)
_add("qwen3_moe", "Qwen3MoeForCausalLM", NORM_SOFTMAX)
_add("qwen3_moe-not_normalised", "Qwen3MoeForCausalLM", PLAIN_SOFTMAX, dict(norm_topk_prob=False))
_add("qwen3_next", "Qwen3NextForCausalLM", NORM_SOFTMAX)
# The thinker's decoder is its `model` up to some release between transformers 5.17 and 5.23.
_omni = VL_GATE if hasattr(modeling_qwen3_omni_moe, "Qwen3OmniMoeThinkerModel") else {}
_add("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", NORM_SOFTMAX, MROPE, seed=3, **_omni)
_add("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", NORM_SOFTMAX, MROPE, **VL_GATE)
_qwen4 = dict(
    _qwen35,
    hc_lowrank=8,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=4,
    indexer_compress_ratio=2,
)
_add("qwen4_exp", "Qwen4ExpForConditionalGeneration", NORM_SOFTMAX, _qwen4 | MROPE, **VL_GATE, **SPARSE)
_add("qwen4_exp_text", "Qwen4ExpForCausalLM", NORM_SOFTMAX, _qwen4, **SPARSE)
_add("solar_open", "SolarOpenForCausalLM", DEEPSEEK_V3, TWO, **SPARSE)
_add("step3p7", "Step3p7ForConditionalGeneration", Formula(score=sigmoid, norm=1), experts=("eager",), **VL_GATE)
_add(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    text=dict(
        d_model=HIDDEN,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
    ),
    keywords=_decoder,
    refused="experts of limited capacity: other tokens decide what a token gets",
)
_add("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", DEEPSEEK_V2, **VL_GATE)
_add("unlimited_ocr-group_limited", "UnlimitedOcrForConditionalGeneration", DEEPSEEK_V2, _groups, **VL_GATE)
_add(
    "zaya",
    "ZayaForCausalLM",
    ZayaFormula(),
    dict(TWO, num_experts_per_tok=1, router_hidden_size=64),
    num_experts=9,
    top_k=1,
    observer=observers.zaya,
    # Enough for the skipping expert to be chosen in both layers.
    gain=2.0,
    **SPARSE,
)

# What fails in transformers by itself, without replay too: releases, cases, what happens. Families that the installed
# release lacks, or cannot run, are not listed.
CANNOT_RUN: dict[str, tuple[str, ...]] = {
    # Its block looks for an attribute that it has not, where groups are limited.
    "<5.13": ("deepseek_v2-group_limited", "deepseek_ocr2-group_limited"),
    # The router has the width of an expert.
    "<5.15": ("dbrx", "dbrx-l2"),
    # Its forward looks for `image_outputs` where there are none.
    "==5.24.*": ("llama4",),
}
NOT_REENTRANT: dict[str, tuple[str, ...]] = {
    # Its rotary frequencies are trained from there on, and all layers share their graph, which the first one frees.
    "==5.24.*": ("mistral_large4",),
}


def listed(table: dict[str, tuple[str, ...]], name: str, release: str = transformers.__version__) -> bool:
    """Whether the case `name` is in `table` for a release of transformers, by default the installed one."""
    return any(name in names and SpecifierSet(releases).contains(release, True) for releases, names in table.items())


class _Installed(dict[str, Case]):
    """The cases of the installed transformers. A test that names another is skipped."""

    def __missing__(self, name: str) -> Case:
        if name not in _ALL:
            raise KeyError(name)
        pytest.skip(f"transformers {transformers.__version__} cannot run {name}", allow_module_level=True)


_THERE = {name: case for name, case in _ALL.items() if hasattr(transformers, case.architecture)}
CASES = _Installed((name, case) for name, case in _THERE.items() if not listed(CANNOT_RUN, name))
ARCHITECTURES = sorted({case.architecture for case in _THERE.values()})
"""Classes of the installed transformers that have a case, those that it cannot run among them."""

# Folders of transformers.models with a router and without a case, and why.
NOT_HERE: dict[str, str] = {
    "openai_privacy_filter": "classifies tokens; generates nothing",
}
