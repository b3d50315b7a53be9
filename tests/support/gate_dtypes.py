"""What the dtype of a router's weights does to the gap, on the CPU: a trainer in bfloat16 against a real vLLM engine.

    python tests/support/gate_dtypes.py qwen3_moe deepseek_v3 glm4_moe ernie4_5_moe

Each family is the tiny model of the zoo, of sizes that vLLM's CPU kernels take, with all weights in bfloat16 but the
gates, whose weights have all the digits of float32. The engine keeps what it is sent in the dtype of its own gate.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch
import transformers
from engine_families import PROMPT_TOKENS, SIZES, TEXT, end
from torch import Tensor, nn
from zoo.case import Case
from zoo.families import CASES

import r3
from r3.capture import engine_kwargs
from r3.doctor.engine_agreement import ask_twice, probe_prompts, score
from r3.weight_sync import LazyWeight, WeightSync, named_weights

COUNT, SAMPLED = 24, 64
FIGURES = ("logprob_diff/live/k3", "logprob_diff/replayed/k3", "routing/differing_rows")
BOTH = (torch.bfloat16, torch.float32)


def gates_of(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    paths = [case.router.format(layer) + ".weight" for layer in case.router_layers]
    return {path: model.get_parameter(path) for path in paths}


def build(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in bfloat16, and its gates' weights in float32."""
    text = TEXT.get(case.name.partition("-")[0])
    full = gates_of(case, case.build(torch.float32, sizes=SIZES, text=text))
    return case.build(torch.bfloat16, sizes=SIZES, text=text), {name: gate.detach() for name, gate in full.items()}


def sent(model: nn.Module, gates: dict[str, Tensor]) -> list[tuple[str, Any]]:
    """All weights of `model`, with `gates` in place of its own, and in their dtype."""

    def chosen(name: str, source: LazyWeight) -> LazyWeight:
        if (gate := gates.get(name)) is None:
            return source
        return replace(source, dtype=gate.dtype, make=lambda: gate, keep_dtype=True, live=False)

    return [(name, chosen(name, source)) for name, source in named_weights(model)]


def run(name: str) -> None:
    from vllm import LLM

    case = CASES[name]
    model, full = build(case)
    folder = tempfile.mkdtemp(prefix="r3-gate-")
    model.save_pretrained(folder)
    replay = r3.attach(model)
    overrides = ("max_model_len=256", "max_num_seqs=16", "kv_cache_gib=0.25")
    config = r3.R3Config.from_overrides(
        [f"generator.inference_engine.{each}" for each in overrides], {"trainer.policy.model.path": folder}
    )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = LLM(**engine_kwargs(config) | {"skip_tokenizer_init": True})
    sync = WeightSync(engine, transport="files", dtype=torch.bfloat16, timeout_s=120, chunk_bytes=1 << 16)
    prompts = probe_prompts(model, count=COUNT, length=PROMPT_TOKENS)
    for version, engine_dtype in enumerate(BOTH, 1):
        sync.push(sent(model, {path: gate.to(engine_dtype) for path, gate in full.items()}), version=version)
        rollouts = ask_twice(engine, prompts, replay.spec, max_tokens=SAMPLED).rollouts
        for trainer_dtype in BOTH:
            for path, gate in gates_of(case, model).items():
                gate.data = full[path].to(trainer_dtype)
            try:
                found = score(model, rollouts)
            except RuntimeError as error:  # a router that computes in the dtype of its input
                sys.stdout.write(f"{name}: trainer {trainer_dtype}, sent {engine_dtype}: {error}\n")
                continue
            figures = ", ".join(f"{key} {found[key]:.2e}" for key in FIGURES)
            sys.stdout.write(f"{name}: trainer {trainer_dtype}, sent {engine_dtype}: {figures}\n")
            sys.stdout.flush()
    end(engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", metavar="FAMILY")
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    sys.stdout.write(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    for name in parser.parse_args().families:
        run(name)
    os._exit(0)  # an engine in this process leaves threads behind


if __name__ == "__main__":
    main()
