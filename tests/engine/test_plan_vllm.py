"""Load plans of vLLM's own layers, and of an engine, give the bits that its loaders give."""

import os
from pathlib import Path

import pytest
import torch
from places import DEMO_MODEL
from plan_toys import assert_same, raw, synced
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import nn

from r3.weight_sync.worker.load_plan.layer_record import own_tensors

LAYERS, EXPERTS = 8, 32


# vLLM's own layers. On CPU they prepack their weights; as on a GPU, they leave them alone where `raw` says so.


def random_weights(seed: int, fused: bool, path: Path = DEMO_MODEL) -> dict[str, torch.Tensor]:
    """Random weights for a model, by the names of its checkpoint or (the demo's) those of transformers 5."""
    generator = torch.Generator().manual_seed(seed)
    stored = load_file(path / "model.safetensors")
    weights = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in sorted(stored.items())}
    weights |= {n: t.float() for n, t in weights.items() if "correction_bias" in n}  # as DeepSeek's checkpoints
    if not fused:
        return weights
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        weights |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    return weights


def real_model(path: Path):
    """vLLM's own model, loaded from its checkpoint, as one rank of this process group; and its configuration."""
    import torch.distributed as dist
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    size, rank = dist.get_world_size(), dist.get_rank()
    settings = {"tensor_parallel_size": size, "enforce_eager": True, "dtype": "bfloat16"}
    config = EngineArgs(model=str(path), **settings).create_engine_config()  # type: ignore[arg-type]
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])  # names vLLM's shared memory
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(size, rank, "env://", rank, "gloo")
            initialize_model_parallel(size, 1)
        return get_model(vllm_config=config), config


def real_job(path: Path, fused: bool) -> dict:
    """Planned against slow with vLLM's model, over two syncs of random weights; what the plan says of itself."""
    with raw():
        with_plan, config = real_model(path)
        without, _ = real_model(path)
        plan = synced(with_plan, config, random_weights(1, fused, path), chunk=40).learned
        learned = tensors_of(with_plan)
        for name in plan.layers:  # as memory that has slept: what no source fills is filled anew
            for fill in plan.layers[name].fills:
                fill.region.of(own_tensors(with_plan.get_submodule(name))[fill.tensor]).fill_(77)
        synced(with_plan, config, random_weights(2, fused, path), plan, chunk=40)
        for seed in (1, 2):
            synced(without, config, random_weights(seed, fused, path), chunk=1000)
        assert_same(tensors_of(with_plan), tensors_of(without))
    changed = [name for name, tensor in tensors_of(with_plan).items() if not torch.equal(tensor, learned[name])]
    fills = [fill for layer in plan.layers.values() for fill in layer.fills]
    assert {c.layer for group in plan.copies.values() for c in group} == plan.layers.keys()
    return plan.describe() | {"changed": changed, "fills": len(fills)}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    made = Ranks(request.param)
    made.size = request.param
    yield made
    made.close()


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.long)])
def test_vllms_own_layers_are_planned_tensor_parallel_too(ranks, fused):
    """A copy a checkpoint tensor: a fused one of 32 experts too, whose gates and ups lie in turns."""
    for found in ranks.all(real_job, DEMO_MODEL, fused, timeout_s=200):
        sources = 3 + LAYERS * (4 + 2 + 2 + 1 + (2 if fused else 3 * EXPERTS))
        assert found["layers_slow"] == 0, found
        assert found["copies"] == found["sources_planned"] == sources
        assert found["sources_dropped"] == found["sources_slow"] == 0
        whole = sum(t.nbytes for t in random_weights(0, fused).values())
        assert found["bytes_planned"] == whole if ranks.size == 1 else found["bytes_planned"] < 0.6 * whole


def test_latent_attention_derives_from_planned_weights_and_padded_rows_stay_zero(ranks, tmp_path):
    """DeepSeek-V3: W_UK and W_UV come of `kv_b_proj`; 100 words are padded to 128; routers have a correction bias."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32)
    heads |= dict(qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, max_position_embeddings=64)
    experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1)
    experts |= dict(first_k_dense_replace=1, topk_method="noaux_tc")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **experts, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for rank, found in enumerate(ranks.all(real_job, tmp_path, False, timeout_s=200)):
        assert found["slow_reasons"] == {}
        assert found["fills"] == (2 if rank == ranks.size - 1 else 0)  # of embedding and head, in the last rank's part
        for layer in (0, 1):
            for derived in ("W_UV", "W_UK_T"):
                assert f"model.layers.{layer}.self_attn.mla_attn.mla_attn.{derived}" in found["changed"], found
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in found["changed"]


# The engine, with its prepacked weights: vLLM's loaders for these, the plan for the rest.


@pytest.fixture(scope="module")
def plan_engine(demo_config):
    from vllm import LLM

    from r3.capture import engine_kwargs

    llm = LLM(**engine_kwargs(demo_config) | {"worker_extension_cls": "plan_worker.PlanWorker"})
    yield llm
    llm.llm_engine.engine_core.shutdown()


def greedy(engine) -> list[list[tuple[int, float]]]:
    from vllm import SamplingParams

    assert engine.reset_prefix_cache()
    ids = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
    done = [engine.generate({"prompt_token_ids": row}, sampling, use_tqdm=False)[0].outputs[0] for row in ids]
    return [[(t, entry[t].logprob) for t, entry in zip(c.token_ids, c.logprobs, strict=True)] for c in done]


@pytest.mark.engine
@pytest.mark.long
def test_an_engine_says_the_same_after_planned_syncs_and_after_slow_ones(plan_engine, tmp_path):
    stored = load_file(DEMO_MODEL / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {
        n: (t.float() + 0.02 * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for n, t in stored.items()
    }
    moved |= {n: t + 0.1 for n, t in stored.items() if "norm" in n}
    paths = {"stored": stored, "moved": moved}
    for name, weights in paths.items():
        save_file(weights, tmp_path / name)
    sync = lambda name, use: plan_engine.collective_rpc("r3_plan_sync", args=(str(tmp_path / name), use))[0]

    reference = greedy(plan_engine)
    learned = sync("stored", False)
    assert greedy(plan_engine) == reference
    # Norms are as their sources have them; the rest is prepacked by CPU builds.
    assert learned["layers_planned"] == LAYERS * 4 + 1 == learned["copies"]
    assert learned["layers_slow"] == LAYERS * 4 + 2
    kinds = {reason.partition(":")[0] for reason in learned["slow"].values()}
    assert {"RoutedExperts", "QKVParallelLinear", "RowParallelLinear", "ParallelLMHead"} <= kinds

    assert sync("stored", True)["again"]
    assert greedy(plan_engine) == reference
    assert sync("moved", True)["again"]
    planned = greedy(plan_engine)
    assert not sync("moved", False)["again"]
    assert greedy(plan_engine) == planned != reference
    assert sync("stored", True)["again"]
    assert greedy(plan_engine) == reference
