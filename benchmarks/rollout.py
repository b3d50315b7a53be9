"""Tokens per second of rollouts, switch by switch, over an engine that neither captures nor tells log-probabilities.

    python -m benchmarks.rollout                      # a GPU: 256 requests of 64 tokens, 1,024 sampled each
    python -m benchmarks.rollout --small              # a CPU: that it runs, not what it takes

A line of JSON for each measurement, and one for all. Two engines of the same random Qwen3-MoE stand side by side and
take turns: `bare`, with vLLM's own settings, no log-probabilities and no text; and r3's (`r3.capture.engine_kwargs`),
whose requests ask for

    r3           what `r3.capture.sampling_kwargs` asks for: sampled log-probabilities as one list, no text
    alone        no log-probabilities and no text: what capture costs
    objects      log-probabilities as an object a token, no text
    text         log-probabilities as an object a token, and text
    streamed     as `text`, with each step's tokens sent as they come: r3's asking before it held them
    cut          top-k without its sets: as `r3`, with `top_k=50` and `top_p=0.9`
    sets         the same with what each token was sampled from, which comes with 54 log-probabilities a token; random
                 weights leave nearly all 50

`collect_s` is what r3 then takes to check the rollouts and lay them out.

Predicted for one H200, of the bare engine: r3 0.9, alone 0.95, objects 0.85, text 0.7, streamed 0.4, cut 0.85, sets
0.5.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, spread
from benchmarks.trl_step import LARGE, SMALL, checkpoint
from r3.capture.kept_ids import SPARE

CUT = {"top_k": 50, "top_p": 0.9}
ASKED: dict[str, dict[str, Any]] = {
    "r3": {"logprobs": 0, "flat_logprobs": True, "detokenize": False},
    "alone": {"detokenize": False},
    "objects": {"logprobs": 0, "detokenize": False},
    "text": {"logprobs": 0},
    "streamed": {"logprobs": 0, "stop": ["never sampled"]},
    "cut": {"logprobs": 0, "flat_logprobs": True, "detokenize": False, **CUT},
    "sets": {"logprobs": CUT["top_k"] + SPARE, "flat_logprobs": True, "detokenize": False, **CUT},
}


def engine(folder: str, size: dict[str, Any], *, bare: bool) -> Any:
    from vllm import LLM

    import r3
    from r3.capture import engine_kwargs

    gpu = torch.cuda.is_available()
    settings = {
        "max_model_len": size["prompt"] + size["tokens"],
        "max_num_seqs": size["prompts"] * size["samples"],
        "enforce_eager": str(not gpu).lower(),
        "gpu_memory_utilization": size["memory"],
    }
    config = r3.R3Config.from_overrides(
        [
            *(f"generator.inference_engine.{name}={value}" for name, value in settings.items()),
            *(f"generator.sampling_params.{name}={value}" for name, value in CUT.items()),
        ],
        {"trainer.policy.model.path": folder},
    )
    kwargs = engine_kwargs(config)
    if bare:
        for name in ("hf_overrides", "worker_extension_cls", "worker_cls", "scheduler_cls", "logprobs_mode"):
            kwargs.pop(name, None)
        kwargs["enable_return_routed_experts"] = False
    return LLM(**kwargs)


def generate(llm: Any, prompts: list[list[int]], tokens: int, **asked: Any) -> tuple[float, Any]:
    """Sampled tokens a second, and vLLM's outputs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, **asked)
    assert llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return len(prompts) * tokens / (time.perf_counter() - began), outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asked", nargs="+", default=list(ASKED), choices=list(ASKED))
    options = parser.parse_args()
    size = SMALL if options.small else LARGE
    # This process has used the GPU when the second engine starts, and CUDA does not survive a fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    requests = size["prompts"] * size["samples"]
    ids = torch.randint(2, size["vocab"], (requests, size["prompt"]), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {way: [] for way in ("bare", *options.asked)}
    collected: dict[str, list[float]] = {way: [] for way in ("r3", "sets")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), size)
        from transformers import AutoConfig, AutoModelForCausalLM

        import r3
        from r3.capture import collect

        with torch.device("meta"):
            spec = r3.attach(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))).spec
        engines = {True: engine(folder, size, bare=True), False: engine(folder, size, bare=False)}
        for turn in range(-1, options.rounds):
            for way in list(rates)[:: 1 if turn % 2 else -1]:
                tokens = size["tokens"] if turn >= 0 else min(64, size["tokens"])
                asked = {"detokenize": False} if way == "bare" else ASKED[way]
                rate, outputs = generate(engines[way == "bare"], ids.tolist(), tokens, **asked)
                if turn < 0:
                    continue
                rates[way].append(rate)
                print(json.dumps({"round": turn, way: round(rate)}), flush=True)
                if way in collected:
                    began = time.perf_counter()
                    rollouts = collect(outputs, spec, sampling_mask=way == "sets")
                    collected[way].append(time.perf_counter() - began)
                    assert all(rollout.routing.rows_valid == len(rollout) - 1 for rollout in rollouts)  # pyrefly: ignore
        for made in engines.values():
            made.llm_engine.engine_core.shutdown()
    ratios = {
        way: spread([mine / bare for mine, bare in zip(found, rates["bare"], strict=True)])
        for way, found in rates.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"tokens_per_s": {way: spread(each) for way, each in rates.items()}, "ratio_to_bare": ratios}
    print(
        json.dumps(
            {
                **machine(device),
                "size": size,
                **found,
                "collect_s": {way: spread(each) for way, each in collected.items() if each},
            }
        )
    )


if __name__ == "__main__":
    main()
