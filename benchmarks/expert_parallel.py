"""Time of a training step under expert parallelism: live, replayed, and replayed with all rows on one rank's experts.

    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel            # two GPUs (NCCL), or CPU ranks (gloo)

Prediction: replayed over live is within 0.98 and 1.02 on GPUs. Replay changes what a router returns and nothing of what
comes after; the exchange of tokens is the same for the same ids. Routing that fills one of P ranks multiplies the time
of the experts by up to P, as the others wait: with two ranks and experts that take half of a step, about 1.5.

Each rank loads its shards by `load_expert_parallel`, of random weights of Qwen3-30B-A3B's layers, and has rows
of its own. The replayed step brings the model's own recorded routing, so that the experts have the same load on both
sides. A step is forward and backward with gradient checkpointing. The three take turns in one run; a ratio is the
median over the rounds. On GPUs, `utilisation` is the share of `--peak` that the model's own operations take, as PaLM
counts them (arXiv 2204.02311, appendix B): 6 for each parameter that a token uses, and 12 x heads x head dimension x
length a layer for attention; what checkpointing computes again is not counted.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import r3
from benchmarks.machine import machine, spread
from r3.diagnostics import LoadSums, rank_load_metrics
from r3.experts import use_experts
from r3.parallel import load_expert_parallel

GPU = dict(layers=4, batch=2, length=4096, hidden=2048, experts=128, intermediate=768, vocab=32768, rounds=15)
CPU = dict(layers=2, batch=2, length=64, hidden=128, experts=16, intermediate=32, vocab=512, rounds=7)
TOP_K = 8


def configuration(options: argparse.Namespace) -> Qwen3MoeConfig:
    heads = max(options.hidden // 64, 2)
    return Qwen3MoeConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 8, 1),
        head_dim=128,
        num_experts=options.experts,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=options.length,
    )


def save_model(options: argparse.Namespace, path: str) -> None:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(configuration(options)).to(torch.bfloat16).save_pretrained(path)


def step_flops(options: argparse.Namespace) -> float:
    """Floating-point operations of a rank's step, by PaLM's count."""
    of = configuration(options)
    width = of.num_attention_heads * of.head_dim
    attention = 2 * of.hidden_size * (width + of.num_key_value_heads * of.head_dim)
    experts = of.hidden_size * (3 * of.num_experts_per_tok * of.moe_intermediate_size + of.num_experts)
    used = of.num_hidden_layers * (attention + experts) + of.hidden_size * of.vocab_size
    return options.batch * options.length * (6 * used + 12 * of.num_hidden_layers * width * options.length)


def on_one_rank(routing: r3.RolloutRouting, ranks: int) -> r3.RolloutRouting:
    """`routing` with the experts of the first rank in place of all others, each as often as another."""
    own = routing.num_experts // ranks
    rows, k = routing.expert_ids.shape[:3].numel(), routing.shape[3]
    ids = (torch.arange(rows)[:, None] * k + torch.arange(k)) % own
    return r3.RolloutRouting(ids.view(routing.shape), routing.valid, routing.layer_ids, routing.num_experts)


def largest_load(routing: r3.RolloutRouting, ranks: int) -> float:
    ids = routing.expert_ids.long()
    load = LoadSums.from_tensors(
        ids, ids, routing.valid, num_experts=routing.num_experts, layer_ids=routing.layer_ids
    ).reduce()
    return rank_load_metrics(load, ranks)["rank_load_max/rollout"]


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one step, of the slowest rank."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = torch.tensor((time.perf_counter() - start) * 1e3)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def measure(options: argparse.Namespace, device: torch.device, path: str) -> dict:
    ranks = dist.get_world_size()
    param_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_expert_parallel(path, ranks, param_dtype=param_dtype)
    use_experts(model)
    r3.attach(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(0, options.vocab, (options.batch, options.length)).to(device)
    with torch.no_grad(), r3.record(model) as recorder:
        model(input_ids=tokens, use_cache=False)
    own = recorder.routing
    sides = {"live": None, "replayed": own, "one rank": on_one_rank(own, ranks)}

    def step(routing: r3.RolloutRouting | None) -> None:
        given = {} if routing is None else {"routed_experts": routing}
        model(input_ids=tokens, labels=tokens, use_cache=False, **given).loss.backward()
        model.zero_grad(set_to_none=True)

    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(options.rounds + 2):
        for side, routing in sides.items():
            took = timed(lambda routing=routing: step(routing), device)
            if turn >= 2:  # the first ones compile and allocate
                found[side].append(took)
    over = {
        side: round(median(a / b for a, b in zip(found[side], found["live"], strict=True)), 4)
        for side in ("replayed", "one rank")
    }
    loads = {side: round(largest_load(routing, ranks), 3) for side, routing in sides.items() if routing is not None}
    result = {"ms": {side: spread(took) for side, took in found.items()}, "over_live": over, "largest_load": loads}
    if device.type == "cuda":
        at_peak_ms = step_flops(options) / (options.peak * 1e9)
        result["utilisation"] = {side: round(at_peak_ms / median(took), 4) for side, took in found.items()}
    return result


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (GPU if cuda else CPU).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU in bfloat16; an H100's and H200's")
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        holder = [folder]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        if dist.get_rank() == 0:
            save_model(options, holder[0])
        dist.barrier()
        result = measure(options, device, holder[0])
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(machine(device) | {"ranks": dist.get_world_size()} | vars(options) | result, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
