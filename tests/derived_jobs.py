"""vLLM's own models, built and synced on the CPU without an engine: every tensor that their layers hold, by path."""

import os
from pathlib import Path

import torch
from plan_toys import synced

from r3.weight_sync import gathered, named_weights
from r3.weight_sync.derived import beside, watch_construction

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)


def trainer(family: str):
    """A tiny random model of transformers."""
    import transformers as hf

    torch.manual_seed(0)
    experts = dict(moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
    if family == "granitemoehybrid":
        mamba = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1)
        sizes = SIZES | dict(intermediate_size=32, shared_intermediate_size=32, layer_types=["mamba", "attention"])
        model = hf.GraniteMoeHybridForCausalLM(
            hf.GraniteMoeHybridConfig(**sizes, **mamba, num_local_experts=4, num_experts_per_tok=2)
        )
    elif family == "deepseek_v3":
        latent = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32)
        groups = dict(n_group=1, topk_group=1, first_k_dense_replace=1, topk_method="noaux_tc")
        model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **experts, **latent, **groups))
    elif family == "lfm2_moe":
        layers = dict(layer_types=["conv", "full_attention"], num_dense_layers=1, conv_L_cache=4)
        model = hf.Lfm2MoeForCausalLM(
            hf.Lfm2MoeConfig(**SIZES, **layers, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
        )
    else:
        model = hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **SIZES,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
                num_experts=4,
                num_experts_per_tok=2,
            )
        )
    model = model.to(torch.bfloat16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.float()
    return model


def save(model, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Other random weights in a checkpoint in `folder`, and by the names of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    return {name: gathered(weight).clone() for name, weight in named_weights(model)}


def engine_model(folder: Path):
    """vLLM's model of a checkpoint, loaded and processed by vLLM, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    watch_construction()
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM 0.32's CPU worker has it
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        block_size=16,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, "env://", 0, "gloo")
            initialize_model_parallel(1, 1)
        return get_model(vllm_config=config), config


def held_by(model) -> dict[str, torch.Tensor]:
    parameters = {f"parameter {name}": p.data for name, p in model.named_parameters()}
    return parameters | dict(beside(model))


def after_a_sync(family: str, folder: Path) -> list[str]:
    """What differs between a model that was synced twice, the second time by its plan, and one that loaded the same."""
    model = trainer(family)
    save(model, folder / "old", 1)
    weights = save(model, folder / "new", 2)
    fresh, _ = engine_model(folder / "new")
    (engine, config), older = engine_model(folder / "old"), save(model, folder / "older", 3)
    plan = synced(engine, config, older, chunk=1000).learned
    synced(engine, config, weights, plan, chunk=1000)
    expected, got = held_by(fresh), held_by(engine)
    assert expected.keys() == got.keys()
    same = lambda a, b: torch.equal(a.float().nan_to_num(7), b.float().nan_to_num(7))
    return [name for name, tensor in expected.items() if not same(tensor, got[name])]


def ties(family: str, folder: Path) -> list[tuple[str, ...]]:
    """Tensors of the checkpoint that the engine holds as one."""
    weights = save(trainer(family), folder / "old", 1)
    engine, config = engine_model(folder / "old")
    return sorted(synced(engine, config, weights, chunk=1000).learned.ties)
