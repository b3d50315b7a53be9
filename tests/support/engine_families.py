"""Mixture-of-experts families through a real engine on the CPU: capture, prefix cache, and weight syncs that arrive.

    python tests/support/engine_families.py qwen3_moe olmoe    # adds their figures to zoo/engines.json, one by one
    python tests/support/engine_families.py --page             # writes docs/reference/engines.md

Each family is the tiny model of the zoo, of sizes that vLLM's CPU kernels take. The engine runs in this process, so
that what stops it from starting is known.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from places import ROOT
from torch import nn
from zoo import engine_table
from zoo.case import CORRECTIONS
from zoo.families import CASES

import r3
from r3.capture import collect, engine_kwargs
from r3.capture.ask import ask
from r3.doctor import engine_agreement
from r3.doctor.engine_agreement import probe_prompts, score
from r3.weight_sync import WeightSync, named_weights

# A block of the KV cache is 128 tokens there: prompts of more are found in the prefix cache.
PROMPT_TOKENS, SAMPLED = 144, 24

SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    share_expert_dim=32,
    shared_experts_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    max_position_embeddings=512,
    head_dim=32,
    sliding_window=64,
    # The one size of vLLM's kernels for latent attention on the CPU.
    q_lora_rank=64,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    index_head_dim=128,
    index_topk=2048,
)
_LATENT = dict(head_dim=64)
_LINEAR = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
# What else a family needs.
TEXT: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    # Transformers never normalises here, whatever this says; vLLM does what it says.
    "deepseek_v2": _LATENT | dict(norm_topk_prob=False),
    # What vLLM reads in the published checkpoints, and transformers' own configuration does not have.
    "deepseek_v3": _LATENT | dict(topk_method="noaux_tc", scoring_func="sigmoid"),
    "jamba": dict(mamba_d_state=16),
    "granitemoehybrid": dict(mamba_d_state=16, mamba_d_head=32, layer_types=["mamba", "attention"]),
    "nemotron_h": dict(ssm_state_size=16, mamba_head_dim=32, chunk_size=128),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"], conv_L_cache=4),
    "glm4_moe": dict(head_dim=32),
    "glm4_moe_lite": _LATENT | dict(first_k_dense_replace=1),
    "hy_v3": dict(head_dim=32, expert_hidden_dim=32),
    # vLLM has one matrix for both.
    "cohere2_moe": dict(layer_types=["full_attention"] * 3, tie_word_embeddings=True),
    "afmoe": dict(layer_types=["full_attention"] * 3),
    "minimax_m2": dict(rotary_dim=16, scoring_func="sigmoid", use_routing_bias=True),
    "llama4_text": dict(num_hidden_layers=4, moe_layers=[1, 3], interleave_moe_layer_step=2),
    "mixtral": dict(sliding_window=None),
    "qwen3_next": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "dbrx": dict(
        d_model=64,
        max_seq_len=512,
        ffn_config=dict(
            hidden_size=64, ffn_hidden_size=32, moe_num_experts=8, moe_top_k=2, ffn_act_fn={"name": "silu"}
        ),
    ),
}


def run(name: str) -> dict[str, Any]:
    """The figures of one family, or why there are none."""
    started = time.perf_counter()
    case = CASES[name]
    found: dict[str, Any] = {"class": case.architecture}
    engine = None
    try:
        from vllm.model_executor.models.registry import ModelRegistry

        # What vLLM runs as a class of transformers, it decorates for its own process: the trainer's would not run here.
        known = getattr(ModelRegistry.models.get(case.architecture), "module_name", "transformers")
        own = known.rpartition(".")[2] != "transformers"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not own))
        found["implementation"] = "vLLM" if own else "transformers"
        model = case.build(torch.bfloat16, sizes=SIZES, text=TEXT.get(name.partition("-")[0]))
        folder = tempfile.mkdtemp(prefix="r3-family-")
        model.save_pretrained(folder)
        replay = r3.attach(model)
        from vllm import LLM

        config = r3.R3Config.from_overrides(
            [
                "generator.inference_engine.max_model_len=256",
                "generator.inference_engine.max_num_seqs=16",
                "generator.inference_engine.kv_cache_gib=0.25",
            ],
            {"trainer.policy.model.path": folder},
        )
        engine = LLM(**engine_kwargs(config) | {"skip_tokenizer_init": True})
        prompts = probe_prompts(model, length=PROMPT_TOKENS)
        greedy(engine, prompts, replay.spec)
        found["starts"] = True
        figures(model, replay, engine, prompts, found)
    except Exception as error:  # whatever vLLM raises where it cannot run a family, and what r3 says of one that runs
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        found |= {"starts": found.get("starts", False), "why": " ".join(lines)[:400]}
    finally:
        end(engine)
    return found | {"seconds": round(time.perf_counter() - started)}


def end(engine: Any) -> None:
    """Leave the process ready for the next engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    if engine is not None:
        engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def figures(model: nn.Module, replay: r3.Replay, engine: Any, prompts: list[list[int]], found: dict[str, Any]) -> None:
    """Adds to `found` as they are measured."""

    def agreement() -> dict[str, float]:
        made = engine_agreement(engine, replay, prompts=prompts, max_tokens=SAMPLED)
        return {name.removeprefix("engine/"): value for name, value in made.metrics().items()}

    found["start"] = agreement()
    found["cached_tokens"] = cached(engine, prompts)
    found["cache"] = agreement()
    sync = WeightSync(engine, transport="files", dtype=torch.bfloat16, timeout_s=120, chunk_bytes=1 << 16)
    before = greedy(engine, prompts, replay.spec)
    sync.push(named_weights(model), version=1)
    apart = distance(before, greedy(engine, prompts, replay.spec))
    found["identity"] = "other choices" if math.isinf(apart) else apart
    old = sample(engine, prompts, replay.spec)
    change(model)
    # Scored with weights that the engine does not have yet: what a sync that does not arrive would look like.
    found["stale_k3"] = score(model, old)["logprob_diff/replayed/k3"]
    sync.push(named_weights(model), version=2)
    found["changed"] = agreement()
    change(model, seed=1)
    sync.push(named_weights(model), version=3)
    found["changed_again"] = agreement()


def sample(engine: Any, prompts: list[list[int]], spec: Any, temperature: float = 1.0) -> r3.capture.Rollouts:
    fields = {"temperature": temperature, "max_tokens": SAMPLED, "ignore_eos": True}
    return collect(ask(engine, [(prompt, fields) for prompt in prompts]).responses, spec)


def greedy(engine: Any, prompts: list[list[int]], spec: Any) -> r3.capture.Rollouts:
    assert engine.reset_prefix_cache()
    return sample(engine, prompts, spec, temperature=0.0)


def distance(first: r3.capture.Rollouts, second: r3.capture.Rollouts) -> float:
    """Largest difference of log-probabilities; infinite where tokens or routing differ."""
    pairs = list(zip(first, second, strict=True))
    for one, other in pairs:
        same = one.token_ids == other.token_ids
        if not same or not torch.equal(one.routing.expert_ids, other.routing.expert_ids):
            return float("inf")
    return max(float((one.logprobs - other.logprobs).abs().max()) for one, other in pairs)


def cached(engine: Any, prompts: list[list[int]]) -> int:
    """Tokens that the engine found in its prefix cache when it was asked once more."""
    responses = ask(engine, [(prompt, {"max_tokens": 1, "temperature": 0.0}) for prompt in prompts]).responses
    return sum(response.num_cached_tokens or 0 for response in responses)


@torch.no_grad()
def change(model: nn.Module, seed: int = 0) -> None:
    """All parameters, and what moves the choice of experts, each by a fifth of what it is or so."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(CORRECTIONS)]
    for name, tensor in [*model.named_parameters(), *buffers]:
        size = 0.1 if name.endswith(CORRECTIONS) or tensor.dim() < 2 else 0.2 * float(tensor.float().std())
        tensor.add_((size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(CASES)}")
    parser.add_argument("--page", action="store_true", help="write docs/reference/engines.md of what was measured")
    args = parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    for name in args.families:
        found = run(name)
        engine_table.add(name, found | {"commit": commit()})
        sys.stdout.write(f"{name}: {found}\n")
        sys.stdout.flush()
    if args.page:
        engine_table.write_page()
    os._exit(0)  # an engine in this process leaves threads behind


if __name__ == "__main__":
    main()
