"""What is left of the training-inference gap: with replay, with an engine's own numerics, and by term.

    python -m benchmarks.gap                       # a MoE and its dense twin, one seed
    python -m benchmarks.gap --seeds 0 1 2 --family qwen3_moe
    python -m benchmarks.gap --family glm4_moe     # sigmoids with a selection bias, and a shared expert
    python -m benchmarks.gap --family qwen3_30b --steps 0    # layers of real size, random: is all equal, at what price?

A small language model is trained (`benchmarks.language_models`). Two vLLM engines sample from it with CUDA graphs: one
with vLLM's defaults, and one for `trainer.policy.numerics=matched`, batch-invariant. The trainer scores the sampled
tokens in bfloat16, live and replayed, with its own kernels and matched; and matched but for one term, which it computes
as transformers does. Each process does one thing, so that no setting of one reaches another. One JSON line for each
engine and way: k3 in nats, its standard error, the share of tokens whose log-probability is not the engine's to the
last bit, the largest difference, the share of extreme tokens (ratio over 2); tokens per second of the engine, and of
forward and backward.

It checks itself: replay must lower k3, all tokens that are matched must be equal, and the first forward of each block
is compared with the model's own (`r3.numerics`).

Predicted before the first whole run, on an H200: k3 replayed 3.5e-5 and of the dense twin 4e-5, of either engine;
matched 0 in all tokens, live and replayed alike, since equal numbers choose equal experts. Of the terms the experts and
the norms make most, 1e-5 each, then attention, rope and router; the linear layers nothing, as cuBLAS and vLLM's kernel
sum in the same order on this GPU; the head 1e-7. The batch-invariant engine samples at 0.6 of the other's rate, and the
trainer's forward and backward take 1.5 times as long. Of glm4_moe the same, with two doubts: live, transformers leaves
the slots unsorted, which changes a sum; and cuBLAS may give its float32 gate other bits in 256 rows than in thousands:
then k3 1e-8, in a tenth of the tokens.

Of qwen3_30b, before its first run: all equal too, live and replayed; the batch-invariant engine at 0.5 of the other's
rate, since its kernels are untuned Triton where the other has cuBLAS and FlashAttention 3; the matched trainer at 0.6
of its own, whose backward is the same. k3 with random weights is below 1e-5, as tokens are near uniform.

Found: docs/benchmarks.md. Not as predicted: the terms do not add up, each alone makes most of the whole. And vLLM
0.26's batch-invariant engine is not: the norm of a sum and glm4_moe's gate depend on the number of rows, until
`r3.vllm_compat.invariant_worker` replaces them.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.language_models import sampled_logprobs
from benchmarks.machine import machine

PROMPT = 64
ROWS = 32  # of a forward
ENGINES = {"default": "own", "batch_invariant": "matched"}


def rollouts_of(folder: Path, name: str) -> Path:
    return folder / "rollouts" / f"{name}.safetensors"  # an engine reads all such files beside the checkpoint


def checkpoint(family: str, seed: int, options: argparse.Namespace) -> Path:
    """The folder of a trained model, which is trained first if it is not there."""
    folder = options.folder / f"{family}-{seed}-{options.steps}"
    if not (folder / "config.json").exists():
        made = ("-m", "benchmarks.language_models", family, folder, "--steps", options.steps, "--seed", seed)
        subprocess.run([sys.executable, *map(str, made)], check=True)
    return folder


def settings(folder: Path, numerics: str, options: argparse.Namespace, *more: str) -> Any:
    from r3 import R3Config

    engine = "generator.inference_engine"
    moe = "moe" in json.loads((folder / "config.json").read_text())["model_type"]
    return R3Config.from_overrides(
        [
            f"trainer.policy.model.path={folder}",
            f"trainer.policy.numerics={numerics}",
            f"trainer.policy.fsdp_config.moe_enable_routing_replay={str(moe).lower()}",
            f"trainer.diagnostics.alarms.enabled={str(moe).lower()}",
            f"{engine}.enable_return_routed_experts={str(moe).lower()}",
            f"{engine}.max_model_len={PROMPT + options.length + 16}",
            f"{engine}.enforce_eager=false",
            f"{engine}.gpu_memory_utilization=0.05",  # what must be free
            f"{engine}.kv_cache_gib=4",  # 256 rollouts at a time
            f"{engine}.max_num_seqs={options.sequences}",
            f"generator.sampling_params.max_generate_length={options.length}",
            *more,
        ]
    )


@contextlib.contextmanager
def byte_engine(config: Any) -> Iterator[Any]:
    """An engine of the settings, for a model without a tokenizer."""
    import vllm

    from r3.capture import running_engine

    made = partial(vllm.LLM, skip_tokenizer_init=True)
    with contextlib.ExitStack() as stack:
        with mock.patch.object(vllm, "LLM", made):
            engine = stack.enter_context(running_engine(config))
        yield engine


def prompts_of(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The same for all engines, from text that the models were not trained on."""
    from benchmarks.language_models import Corpus

    rows = Corpus.of("cpu").batch(options.sequences, PROMPT, torch.Generator().manual_seed(7), held_out=True)
    return [{"prompt_token_ids": row} for row in rows.tolist()]


def sampling_of(config: Any, **more: Any) -> Any:
    """One rollout of each prompt, of the full length."""
    import vllm

    from r3.capture import sampling_kwargs

    return vllm.SamplingParams(**sampling_kwargs(config) | {"ignore_eos": True, "n": 1} | more)


def sample(folder: Path, name: str, options: argparse.Namespace) -> None:
    """Rollouts of one engine, kept in `folder`, and its tokens per second: the best of three batches after one."""
    import r3
    from r3.capture import collect, save_rollouts

    config = settings(folder, ENGINES[name], options)
    prompts = prompts_of(options)
    with byte_engine(config) as engine:
        seconds = float("inf")
        for batch in range(4):
            started = time.perf_counter()
            outputs = engine.generate(prompts, sampling_of(config), use_tqdm=False)
            seconds = min(seconds, time.perf_counter() - started) if batch else seconds
    spec = None
    if config.generator.inference_engine.enable_return_routed_experts:
        from transformers import AutoModelForCausalLM

        spec = r3.attach(AutoModelForCausalLM.from_pretrained(folder)).spec
    rollouts = collect(outputs, spec)
    rollouts_of(folder, name).parent.mkdir(exist_ok=True)
    save_rollouts(rollouts, rollouts_of(folder, name))
    rate = options.sequences * options.length / seconds
    print(json.dumps({"sampled_by": name, "engine_tokens_per_s": round(rate)}), flush=True)


def difference(apart: Tensor) -> dict[str, float]:
    """What log-ratios, float64 `[tokens]` in nats, come to."""
    k3 = apart.exp() - 1 - apart
    return {
        "k3": k3.mean().item(),
        "k3_error": (k3.std() / len(k3) ** 0.5).item(),
        "not_equal": (apart != 0).double().mean().item(),
        "largest": apart.abs().max().item(),
        "extreme": (apart.abs() > math.log(2)).double().mean().item(),
        "tokens": len(apart),
    }


class Trainer:
    """The checkpoint in bfloat16 with replay, and how it scores a batch of rollouts."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        import r3
        from r3.experts import use_experts
        from r3.parallel import fused_head

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
        use_experts(self.model)
        self.replay = r3.attach(self.model) if "moe" in self.model.config.model_type else None
        self.head = fused_head(self.model)

    def logprobs(self, batch: Any, rows: slice, *, replayed: bool) -> Tensor:
        """Float32 `[R, S]`, entry t of token t."""
        part = batch.select(rows)
        return sampled_logprobs(self.model, self.head, part, part.routing if replayed else None, self.model.device)

    @torch.no_grad()
    def compare(self, batch: Any, *, replayed: bool) -> dict[str, float]:
        rows = len(batch.input_ids)
        found = [self.logprobs(batch, slice(i, i + ROWS), replayed=replayed) for i in range(0, rows, ROWS)]
        mask = batch.response_mask.cuda()
        apart = (torch.cat(found) - batch.logprobs.cuda())[mask].double()
        return difference(apart)

    def tokens_per_second(self, batch: Any, *, replayed: bool) -> float:
        """Of forward and backward, the best of three after one that warms up."""
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.logprobs(batch, slice(0, ROWS), replayed=replayed).sum().backward()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
            self.model.zero_grad(set_to_none=True)
        return ROWS * batch.input_ids.shape[1] / best


def _own_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _own_rotate(query: Tensor, key: Tensor, positions: Tensor, cache: Tensor) -> None:
    cos, sin = (part.repeat(1, 2)[:, None] for part in cache[positions].chunk(2, -1))
    for heads in (query, key):
        rotated = heads[..., : cache.shape[-1]]  # the rest of a head has no position, where rope is partial
        first, second = rotated.chunk(2, -1)
        rotated.copy_(rotated * cos + torch.cat((-second, first), -1) * sin)


def _own_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    count = len(bounds) - 1  # all of one length here
    heads = [t.view(count, longest, *t.shape[1:]).transpose(1, 2) for t in (query, key, value)]
    found = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).reshape(query.shape)


def _own_weights(logits: Tensor, ids: Tensor, *, renormalize: bool) -> Tensor:
    weights = logits.float().softmax(-1).gather(1, ids.long())
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    return weights.to(logits.dtype).float()


def _own_sigmoid_weights(logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.sigmoid().gather(1, ids.long())
    return weights / (weights.sum(-1, keepdim=True) + 1e-20)


def _own_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _own_experts(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    total = torch.zeros_like(hidden)
    for expert in range(len(gate_up)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, -1)
        part = F.linear(F.silu(gate) * up, down[expert]) * weights[token, slot, None]
        total.index_add_(0, token, part.to(total.dtype))
    return total


def _own_silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


TERMS: dict[str, dict[str, Callable]] = {
    "linear layers": {"linear": F.linear},
    "norms": {"rms_norm": _own_norm},
    "rope": {"rotate": _own_rotate},
    "attention": {"attention": _own_attention},
    "router weights": {"softmax_weights": _own_weights, "sigmoid_weights": _own_sigmoid_weights},
    "experts": {"experts": _own_experts},
    "MLPs and shared experts": {"mlp": _own_mlp},
    "silu": {"silu_and_mul": _own_silu_and_mul},
}


@contextlib.contextmanager
def as_transformers(*terms: str) -> Iterator[None]:
    """In this context these terms of a matched model are computed as transformers does."""
    from r3.vllm_compat import kernels

    with contextlib.ExitStack() as stack:
        for term in terms:
            for name, own in TERMS[term].items():
                stack.enter_context(mock.patch.object(kernels, name, own))
        yield


def tell(engine: str, way: str, found: dict[str, float]) -> dict[str, float]:
    shown = {key: value if isinstance(value, int) else float(f"{value:.4g}") for key, value in found.items()}
    print(json.dumps({"engine": engine, "trainer": way} | shown), flush=True)
    return found


def tell_speed(engine: str, way: str, rate: float) -> None:
    print(json.dumps({"engine": engine, "trainer": way, "trainer_tokens_per_s": round(rate)}), flush=True)


def own(folder: Path, name: str, options: argparse.Namespace) -> None:
    """Compare the trainer with one engine's rollouts, each with its own kernels."""
    from r3.capture import load_rollouts

    batch, trainer = load_rollouts(rollouts_of(folder, name)).batch(0), Trainer(folder)
    moe = trainer.replay is not None
    live = tell(name, "live", trainer.compare(batch, replayed=False))
    if moe:
        replayed = tell(name, "replayed", trainer.compare(batch, replayed=True))
        if not replayed["k3"] < live["k3"]:
            raise SystemExit(f"gap: expected replay to lower k3, got {live['k3']:.3g}, replayed {replayed['k3']:.3g}")
    tell_speed(name, "own", trainer.tokens_per_second(batch, replayed=moe))


def matched(folder: Path, name: str, options: argparse.Namespace) -> None:
    """Compare a trainer that has the batch-invariant engine's values with one engine's rollouts."""
    from r3 import numerics
    from r3.capture import load_rollouts

    numerics.prepare()
    batch, trainer = load_rollouts(rollouts_of(folder, name)).batch(0), Trainer(folder)
    moe = trainer.replay is not None
    handle = numerics.match_engine(trainer.model, trainer.head)
    found = tell(name, "matched", trainer.compare(batch, replayed=moe))
    if handle.unchecked:
        raise SystemExit(f"gap: expected all blocks to run, these did not: {handle.unchecked}")
    if moe:
        tell(name, "matched, live", trainer.compare(batch, replayed=False))
    tell_speed(name, "matched", trainer.tokens_per_second(batch, replayed=moe))
    if name != "batch_invariant":
        return
    for term, functions in TERMS.items():
        if moe or not {"softmax_weights", "experts"} & functions.keys():
            with as_transformers(term):
                tell(name, f"matched but for {term}", trainer.compare(batch, replayed=moe))
    trainer.head.engine_logprobs = None
    tell(name, "matched but for head", trainer.compare(batch, replayed=moe))
    if found["not_equal"]:
        raise SystemExit(f"gap: expected all tokens to be equal, got {found['not_equal']:.3g} of them that are not")


def run(*arguments: Any) -> None:
    command = [sys.executable, "-m", "benchmarks.gap", *map(str, arguments)]
    # A fork of a process whose threads have computed can stand still in the engine.
    subprocess.run(command, check=True, env=os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=["qwen3_moe", "qwen3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400, help="of training the model")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=512, help="sampled tokens of each")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "r3-gap")
    parser.add_argument("--do", nargs=3, metavar=("WHAT", "FOLDER", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        what, folder, name = options.do
        {"sample": sample, "own": own, "matched": matched}[what](Path(folder), name, options)
        return
    print(json.dumps(machine(torch.device("cuda"))), flush=True)
    sizes = ("--sequences", options.sequences, "--length", options.length)
    for seed in options.seeds:
        for family in options.family:
            folder = checkpoint(family, seed, options)
            print(json.dumps({"family": family, "seed": seed}), flush=True)
            for name in ENGINES:
                for what in ("sample", "own", "matched"):
                    run("--do", what, folder, name, *sizes)


if __name__ == "__main__":
    main()
