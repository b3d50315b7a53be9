"""Time and peak memory of a training step of a Qwen3-MoE: live, and replayed through `r3.attach`.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --layers 16 --optimizer adamw

The model has Qwen3-30B-A3B's layers and random weights; the replayed step brings the model's own recorded routing, so
that the experts have the same load on both sides and the losses can be compared. A step is forward, backward with
gradient checkpointing and, if asked for, an optimizer step of learning rate 0. Live and replayed take turns in one run;
a ratio is the median over the rounds. The routing starts on the host, so that its transfer counts.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import r3
from benchmarks.machine import machine, spread

GPU = dict(layers=8, batch=4, length=4096, hidden=2048, experts=128, intermediate=768, vocab=32768, rounds=15)
CPU = dict(layers=2, batch=2, length=64, hidden=128, experts=16, intermediate=32, vocab=512, rounds=5)
TOP_K = 8
HEAD_DIM = 128


def build(options: argparse.Namespace, device: torch.device) -> Qwen3MoeForCausalLM:
    heads = max(options.hidden * 2 // HEAD_DIM, 2)
    config = Qwen3MoeConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 8, 1),
        head_dim=HEAD_DIM,
        num_experts=options.experts,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=options.length,
        # On a CPU in bf16, torch's grouped product is slower than a loop over the experts.
        experts_implementation="grouped_mm" if device.type == "cuda" else "eager",
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def optimizer_of(name: str, model: Qwen3MoeForCausalLM) -> torch.optim.Optimizer | None:
    if name == "none":
        return None
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name](model.parameters(), lr=0.0, weight_decay=0.0)


def step_of(
    model: Qwen3MoeForCausalLM, tokens: Tensor, optimizer: torch.optim.Optimizer | None
) -> Callable[..., Tensor]:
    def step(**routing) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, **routing).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step


def gate_gradients(model: Qwen3MoeForCausalLM) -> Tensor:
    """All gates' gradients in one float64 vector, on the host."""
    return torch.cat([layer.mlp.gate.weight.grad.cpu().double().flatten() for layer in model.model.layers])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def with_live_rows(routing: r3.RolloutRouting, share: float) -> r3.RolloutRouting:
    """`routing` with `share` of its rows not valid, evenly spread."""
    valid = routing.valid.clone()
    if share:
        valid.view(-1)[:: round(1 / share)] = False
    return r3.RolloutRouting(routing.expert_ids, valid, routing.layer_ids, routing.num_experts)


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Milliseconds and peak bytes of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if device.type != "cuda":
        return (time.perf_counter() - start) * 1e3, 0
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, torch.cuda.max_memory_allocated()


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    model = build(options, device)
    tokens = torch.randint(0, options.vocab, (options.batch, options.length), device=device)
    with torch.no_grad(), r3.record(model) as recorder:
        model(input_ids=tokens, use_cache=False)
    routing = with_live_rows(recorder.routing, options.live)
    if options.pin:
        routing = routing.pin_memory()
    step = step_of(model, tokens, optimizer_of(options.optimizer, model))
    losses, gradients = [], []
    for _ in range(3):  # a backward on a GPU adds in no fixed order: live differs from live, too
        losses.append(step().item())
        gradients.append(gate_gradients(model))
    peaks = {"live": timed(step, device)[1]}  # before attach, which may keep memory
    replay = r3.attach(model)
    runs = {"live": step, "replayed": lambda: step(routed_experts=routing)}
    losses.append(runs["replayed"]().item())
    gradients.append(gate_gradients(model))
    report = replay.last
    assert report is not None
    peaks["replayed"] = timed(runs["replayed"], device)[1]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            samples[name].append(timed(runs[name], device)[0])
    ratios = [replayed / live for live, replayed in zip(samples["live"], samples["replayed"], strict=True)]
    result: dict = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows_replayed": report.rows_replayed,
        "loss": {"live": losses[:3], "replayed": losses[3]},
        "gate_gradient_distance": {  # from the first step
            "live": [distance(gradient, gradients[0]) for gradient in gradients[1:3]],
            "replayed": distance(gradients[3], gradients[0]),
        },
        "ms": {name: spread(found) for name, found in samples.items()},
        "time_ratio": spread(ratios),
    }
    if device.type == "cuda":
        result |= {"peak_bytes": peaks, "memory_ratio": round(peaks["replayed"] / peaks["live"], 5)}
    return result


def arguments(defaults: dict[str, int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--optimizer", choices=("none", "sgd", "adamw"), default="none")
    parser.add_argument("--live", type=float, default=0.0, help="share of rows that are not valid and routed live")
    parser.add_argument("--pin", action="store_true", help="routing in pinned host memory")
    return parser.parse_args()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = arguments(GPU if device.type == "cuda" else CPU)
    about = machine(device) | vars(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    result = measure(options, device)
    for name, ms in result["ms"].items():
        peak = f", peak {result['peak_bytes'][name] / 2**30:.3f} GiB" if "peak_bytes" in result else ""
        print(f"{name:9} {ms['median']:9.2f} ms a step ({ms['p10']:.2f} to {ms['p90']:.2f}){peak}")
    ratio = result["time_ratio"]
    print(f"replayed / live: time {ratio['median']:.4f} ({ratio['p10']:.4f} to {ratio['p90']:.4f})", end="")
    print(f", memory {result['memory_ratio']:.5f}" if "memory_ratio" in result else "")
    print(json.dumps({"benchmark": "train_step", **about, **result}))


if __name__ == "__main__":
    main()
