"""Rollouts with capture on, over the same with capture off: tokens per second of a real vLLM engine.

    python -m benchmarks.capture                              # 24 layers, 64 experts, top 8
    python -m benchmarks.capture --shape qwen3-30b-a3b --ways off,r3

One line of JSON. Random weights. The engines of all ways stand side by side on one GPU and take turns, so that each
ratio is of the same run: `off` without capture, `vllm` with vLLM's own scheduler, `r3` with r3's.
`agreement` is the share of choices (token and layer) that a prefill of the same tokens, alone, makes again: the rest is
what rounding flips, and rows that are a token off would agree in nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, spread

SHAPES: dict[str, dict[str, int]] = {
    "24-layers": dict(num_hidden_layers=24, hidden_size=1024, num_experts=64, moe_intermediate_size=512),
    "qwen3-30b-a3b": dict(num_hidden_layers=48, hidden_size=2048, num_experts=128, moe_intermediate_size=768),
}
VOCABULARY = 32_000


def write_config(folder: Path, shape: str) -> None:
    from transformers import Qwen3MoeConfig

    wanted = SHAPES[shape]
    config = Qwen3MoeConfig(
        **wanted,
        vocab_size=VOCABULARY,
        intermediate_size=4 * wanted["hidden_size"],
        num_attention_heads=wanted["hidden_size"] // 64,
        num_key_value_heads=4,
        head_dim=128 if wanted["hidden_size"] > 1024 else 64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=8192,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)


def engine(folder: Path, way: str, args: argparse.Namespace) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = dict(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=max(args.batches),
        enable_return_routed_experts=way != "off",
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        gpu_memory_utilization=0.9 / len(args.ways),
        enforce_eager=args.eager,
        enable_prefix_caching=not args.no_prefix_caching,
    )
    if way == "r3":
        settings["scheduler_cls"] = "r3.capture.in_engine.routing_scheduler.capture_scheduler"
    return LLM(**settings)


def tokens_per_second(llm: Any, batch: int, prompt: int, output: int, seed: int, way: str) -> float:
    from vllm import SamplingParams

    ids = torch.randint(0, VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = SamplingParams(temperature=1.0, max_tokens=output, min_tokens=output, ignore_eos=True, logprobs=0)
    sampling.detokenize = False
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
    taken = time.perf_counter() - start
    rows = [completion.routed_experts for request in outputs for completion in request.outputs]
    assert all((r is None) == (way == "off") for r in rows)
    if way != "off":
        assert all(len(r) == prompt + output - 1 for r in rows)
        ordered = np.sort(rows[-1], axis=-1)
        assert (ordered[..., 1:] != ordered[..., :-1]).all(), "an expert occurs twice in a row"
    return batch * output / taken


def agreement(llm: Any, batch: int, prompt: int, output: int) -> float:
    """Share of the choices of requests that ran together which a prefill of the same tokens, alone, makes again."""
    from vllm import SamplingParams

    ids = torch.randint(0, VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(99)).tolist()
    together = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, detokenize=False)
    alone = SamplingParams(max_tokens=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], together, use_tqdm=False)
    same: list[float] = []
    for row, request in list(zip(ids, outputs, strict=True))[:: max(1, batch // 8)]:
        sampled = request.outputs[0]
        assert llm.reset_prefix_cache()
        again = llm.generate([{"prompt_token_ids": row + list(sampled.token_ids[:-1])}], alone, use_tqdm=False)
        found, expected = (np.sort(r.routed_experts, axis=-1) for r in (sampled, again[0].outputs[0]))
        assert found.shape == expected.shape, (found.shape, expected.shape)
        same.append(float((found == expected).all(-1).mean()))
    return float(np.mean(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="24-layers")
    parser.add_argument("--ways", default="off,vllm,r3", help="off, vllm, r3; the first is what ratios are over")
    parser.add_argument("--batches", default="32,256", help="requests at a time")
    parser.add_argument("--outputs", default="256,1024", help="tokens to sample of each")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-gib", type=float, default=12.0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--no-prefix-caching", action="store_true")
    args = parser.parse_args()
    args.batches = [int(n) for n in args.batches.split(",")]
    ways = args.ways = args.ways.split(",")
    found: dict[str, Any] = {**machine(torch.device("cuda")), "shape": args.shape, "prompt": args.prompt}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.shape)
        engines = {way: engine(Path(folder), way, args) for way in ways}
        batch, output = max(args.batches), int(args.outputs.split(",")[0])
        found["agreement"] = {
            way: agreement(made, batch, args.prompt, output) for way, made in engines.items() if way != "off"
        }
        print(json.dumps(found["agreement"]), file=sys.stderr, flush=True)
        for batch in args.batches:
            for output in map(int, args.outputs.split(",")):
                rates: dict[str, list[float]] = {way: [] for way in ways}
                for turn in range(-1, args.rounds):
                    for way in ways[:: 1 if turn % 2 else -1]:
                        rate = tokens_per_second(engines[way], batch, args.prompt, output, turn + 1, way)
                        if turn >= 0:
                            rates[way].append(rate)
                found[f"{batch} x {output}"] = {
                    "tokens_per_s": {way: spread(values) for way, values in rates.items()},
                    "ratio": {
                        way: spread([mine / off for mine, off in zip(rates[way], rates[ways[0]], strict=True)])
                        for way in ways[1:]
                    },
                }
                print(batch, output, json.dumps(found[f"{batch} x {output}"]), file=sys.stderr, flush=True)
        for made in engines.values():
            made.llm_engine.engine_core.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
