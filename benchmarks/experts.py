"""Time, memory and error of transformers' experts functions and of r3's, in a training step and alone.

    python -m benchmarks.experts
    python -m benchmarks.experts --layers 12 --batch 1 --length 17000 --hidden 1024 --experts 64 --intermediate 384
    python -m benchmarks.experts --small

Three parts, each with all implementations in turn, medians over the rounds:

- errors of one expert layer in bfloat16, result and gradients, against a loop over the experts in float64;
- one expert layer alone, forward and backward under checkpointing, on random ids;
- a training step of a Qwen3-MoE of such layers, as `benchmarks.train_step` measures it: forward, and backward with
  checkpointing. A ratio is to `grouped_mm`, in the same round. `trainer` is r3's, with the head scoring tokens by
  itself and, where liger-kernel is installed and there is a GPU, Liger's norms.

Then the kernels of r3's step that take longest, and what sorting the pairs by expert takes of a layer. TFLOP/s count
the products of experts, attention, head and, of each but the head, those that checkpointing repeats.

Predicted before the first run, for one H200 and the defaults, where a step takes 373 ms and 30% of that are elementwise
kernels: of 46 ms of a layer, the experts' products are 12 (4.9 TFLOP at 400 TFLOP/s), attention and the rest 8, and the
other 26 stand between products: mask fills, products with weights, copies, and two sorted scatter-adds of 131,072 rows
in the backward. One kernel for each step between products moves 5.5 GB a layer: 1.6 ms. No second down product saves 1
more. So: a step of 0.55 to 0.62 of grouped_mm's, an expert layer alone of 0.40 to 0.50, peak memory no more, errors no
larger. Sorting takes 0.1 ms a pass, 1% of a layer: preparing it ahead would not pay. `trainer`, predicted when a first
run had shown 0.70 for r3's experts: the norms' six passes over 285 MB of a layer, twice forward and once backward, are
5 ms a layer and become 1; the model's own loss makes 3 GB of logits and is 6 ms more than the head's. 0.60.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_liger_kernel_available

from benchmarks.machine import machine, spread
from benchmarks.train_step import CPU, GPU, HEAD_DIM, TOP_K, build, step_of, timed
from r3.experts import NAME, register
from r3.experts.order import order_by_expert
from r3.parallel import fused_head, next_tokens
from trainer_hooks.liger import use_liger_norms

IMPLEMENTATIONS = ("grouped_mm", NAME, "eager", "batched_mm", "sonicmoe")
TRAINER = "trainer"
SAMPLE = 128  # tokens of the comparison with float64: batched_mm copies the weights of each pair
Result = dict[str, Tensor]


def inputs_of(layer: nn.Module, tokens: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden states, ids, weights that add up to 1, and the result's gradient."""
    weight = next(layer.parameters())
    draw = partial(torch.randn, device=weight.device, dtype=weight.dtype)
    scores = torch.rand(tokens, options.experts, device=weight.device)
    weights = draw(tokens, TOP_K).float().softmax(-1).to(weight.dtype)
    return draw(tokens, options.hidden), scores.topk(TOP_K, sorted=False).indices, weights, draw(tokens, options.hidden)


def outcome(layer: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> Result:
    layer.zero_grad(set_to_none=True)
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    result = checkpoint(layer, hidden, ids, weights, use_reentrant=False)
    result.backward(grad)
    found = {"result": result.detach(), "hidden": hidden.grad, "weights": weights.grad}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


def exact(layer: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> Result:
    """`outcome` in float64, an expert at a time."""
    up, down = layer.gate_up_proj, layer.down_proj
    hidden, weights, grad = (t.detach().double() for t in (hidden, weights, grad))
    result, grad_hidden, grad_weights = torch.zeros_like(hidden), torch.zeros_like(hidden), torch.zeros_like(weights)
    grad_up, grad_down = (torch.zeros_like(w, dtype=torch.float64) for w in (up, down))
    for expert in range(len(up)):
        tokens, slots = torch.where(ids == expert)
        h, w = hidden[tokens].requires_grad_(), weights[tokens, slots].requires_grad_()
        u, d = up[expert].detach().double().requires_grad_(), down[expert].detach().double().requires_grad_()
        gate, value = (h @ u.t()).chunk(2, -1)
        part = (nn.functional.silu(gate) * value) @ d.t() * w[:, None]
        found = torch.autograd.grad(part, (h, w, u, d), grad[tokens])
        result.index_add_(0, tokens, part.detach())
        grad_hidden.index_add_(0, tokens, found[0])
        grad_weights[tokens, slots] = found[1]
        grad_up[expert], grad_down[expert] = found[2:]
    return {
        "result": result,
        "hidden": grad_hidden,
        "weights": grad_weights,
        "gate_up_proj": grad_up,
        "down_proj": grad_down,
    }


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def usable(model: nn.Module, layer: nn.Module, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """The implementations that run here, with the errors of a layer; prints of the others why not."""
    inputs = inputs_of(layer, SAMPLE, options)
    expected = exact(layer, *inputs)
    for name in options.implementations:
        try:
            model.set_experts_implementation(name)
            found = outcome(layer, *inputs)
        except Exception as problem:  # whatever a package that is not here, or too old, comes up with
            print(f"{name:12} not here: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}")
            continue
        yield name, {part: error(found[part], expected[part]) for part in expected}


def in_turn(
    names: list[str], rounds: int, run: Callable[[str], Callable[[], object]], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of every round, and peak bytes, by implementation."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    peaks = {}
    for name in names:
        timed(run(name), device)  # compiles
    for turn in range(rounds):
        for name in names[:: 1 if turn % 2 else -1]:
            ms, peaks[name] = timed(run(name), device)
            samples[name].append(ms)
    return samples, peaks


def products(options: argparse.Namespace) -> tuple[float, float]:
    """Floating-point operations of products: of one expert layer, and of the step."""
    tokens = options.batch * options.length
    experts = 2 * tokens * TOP_K * 3 * options.hidden * options.intermediate
    heads = max(options.hidden * 2 // HEAD_DIM, 2)
    query, key = heads * HEAD_DIM, max(heads // 8, 1) * HEAD_DIM
    attention = 2 * tokens * options.hidden * (2 * query + 2 * key) + 2 * tokens * options.length * query
    head = 2 * tokens * options.hidden * options.vocab
    return 4 * experts, 4 * (experts + attention) * options.layers + 3 * head


def share_of_sorting(layer: nn.Module, options: argparse.Namespace, device: torch.device) -> float:
    """Milliseconds of one `order_by_expert`."""
    _, ids, _, _ = inputs_of(layer, options.batch * options.length, options)

    def sort() -> None:
        for _ in range(10):
            order_by_expert(ids, options.experts)

    timed(sort, device)
    return timed(sort, device)[0] / 10


def kernels_of(step: Callable[[], object], device: torch.device) -> str:
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    spent = {event.key: (event.self_device_time_total or event.self_cpu_time_total, event.count) for event in events}
    total = sum(us for us, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:16]
    lines = [f"{us / 1e3:9.2f} ms {us / total:6.1%} {count:5} x {name[:90]}" for name, (us, count) in longest]
    return "\n".join([f"{total / 1e3:9.2f} ms in all kernels", *lines])


def as_trained(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """A step of a copy of `model` as r3's trainer has it."""
    mine: Any = copy.deepcopy(model)
    mine.set_experts_implementation(NAME)
    head = fused_head(mine)
    if tokens.is_cuda and is_liger_kernel_available():
        use_liger_norms(mine)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    labels = next_tokens(tokens, positions)

    def step() -> None:
        mine.zero_grad(set_to_none=True)
        logprobs = head.logprobs(mine, labels, input_ids=tokens, position_ids=positions, use_cache=False)
        (-logprobs.mean()).backward()

    return step


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    register()
    model = build(options, device)
    layer = model.model.layers[0].mlp.experts
    errors = dict(usable(model, layer, options))
    timed_names = [name for name in errors if name not in options.untimed]
    inputs = inputs_of(layer, options.batch * options.length, options)

    def alone(name: str) -> Callable[[], object]:
        model.set_experts_implementation(name)
        return lambda: outcome(layer, *inputs)

    tokens = torch.randint(0, options.vocab, (options.batch, options.length), device=device)
    step = step_of(model, tokens, None)

    def whole(name: str) -> Callable[[], object]:
        model.set_experts_implementation(name)
        return step

    layer_ms, layer_peaks = in_turn(timed_names, options.rounds, alone, device)
    trained = as_trained(model, tokens)
    of_step_ms = [*timed_names, TRAINER]
    step_ms, step_peaks = in_turn(
        of_step_ms, options.rounds, lambda name: trained if name == TRAINER else whole(name), device
    )
    of_layer, of_step = products(options)
    base = timed_names[0]
    result: dict = {
        name: {
            "layer_ms": spread(layer_ms[name]),
            "layer_tflops": round(of_layer / spread(layer_ms[name])["median"] / 1e9, 1),
            "layer_ratio": spread([a / b for a, b in zip(layer_ms[name], layer_ms[base], strict=True)]),
            "layer_peak_gb": round(layer_peaks[name] / 1e9, 3),
            "step_ms": spread(step_ms[name]),
            "step_tflops": round(of_step / spread(step_ms[name])["median"] / 1e9, 1),
            "step_ratio": spread([a / b for a, b in zip(step_ms[name], step_ms[base], strict=True)]),
            "step_peak_gb": round(step_peaks[name] / 1e9, 3),
        }
        for name in timed_names
    }
    result[TRAINER] = {
        "step_ms": spread(step_ms[TRAINER]),
        "step_tflops": round(of_step / spread(step_ms[TRAINER])["median"] / 1e9, 1),
        "step_ratio": spread([a / b for a, b in zip(step_ms[TRAINER], step_ms[base], strict=True)]),
        "step_peak_gb": round(step_peaks[TRAINER] / 1e9, 3),
    }
    kernels = {name: kernels_of(whole(name), device) for name in timed_names if name in options.profile}
    if TRAINER in options.profile:
        kernels[TRAINER] = kernels_of(trained, device)
    return {
        "errors": {name: {part: float(f"{value:.3g}") for part, value in e.items()} for name, e in errors.items()},
        "times": result,
        "sort_ms": round(share_of_sorting(layer, options, device), 4),
        "kernels": kernels,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    defaults = CPU if "--small" in sys.argv else GPU | dict(rounds=9)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), help="the first is the base")
    parser.add_argument(
        "--untimed", nargs="*", default=["batched_mm"], help="compared with float64 alone; default: batched_mm"
    )
    parser.add_argument("--profile", nargs="*", default=[TRAINER], help=f"show their kernels; default: {TRAINER}")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    about = machine(device) | vars(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    result = measure(options, device)
    for name, errors in result["errors"].items():
        print(f"{name:12} errors " + ", ".join(f"{part} {value:.2e}" for part, value in errors.items()))
    for name, times in result["times"].items():
        for part in ("layer", "step") if "layer_ms" in times else ("step",):
            ms, ratio = times[f"{part}_ms"], times[f"{part}_ratio"]
            print(
                f"{name:12} {part:5} {ms['median']:9.2f} ms ({ms['p10']:.2f} to {ms['p90']:.2f}), "
                f"{times[f'{part}_tflops']:6.1f} TFLOP/s, ratio {ratio['median']:.3f} "
                f"({ratio['p10']:.3f} to {ratio['p90']:.3f}), peak {times[f'{part}_peak_gb']:.2f} GB"
            )
    print(f"sorting pairs by expert: {result['sort_ms']:.3f} ms a pass")
    for name, table in result.pop("kernels").items():
        print(f"kernels of a step, {name}:\n{table}")
    print(json.dumps({"benchmark": "experts", **about, **result}))


if __name__ == "__main__":
    main()
