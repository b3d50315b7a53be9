"""Time of a router, forward and backward: live, replayed, and with its outputs rewritten by a hook.

    python -m benchmarks.router
    python -m benchmarks.router --profile --case deepseek-v3

The routers are those of transformers, in bf16, and replay their own live choice, so that all do the same work and
their results can be compared. The variants take turns in one run; a ratio is the median, over the rounds, of a
variant's time to that of live. `eager` is wall time of many steps in a row, with Python and the launches; `gpu` is the
time of a CUDA graph of the same step, without them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from benchmarks.machine import machine, spread
from r3.replay.discovery import RouterSite
from r3.replay.proof import prove
from r3.replay.topk import Choice, TopKSubstitution

LAYERS = 4  # of the routing: one layer's ids are a strided column of it

Outputs = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, K], ids [T, K]


def qwen3_moe(hidden: int) -> nn.Module:
    return Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=hidden, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
    )


def deepseek_v3(hidden: int) -> nn.Module:
    config = dict(n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
    return DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=hidden, norm_topk_prob=True, **config))


def softmax_weights(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.softmax(-1, dtype=torch.float).gather(-1, ids)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)


def sigmoid_weights(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.sigmoid().gather(-1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor


Weights = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A router of transformers, and the formula of its weights for the hook."""

    build: Callable[[int], nn.Module]
    hidden: int
    weights: Weights


@dataclass(frozen=True)
class Inputs:
    """What the variants are given: compact ids [T, K], and one row in 100 to be routed live, [T / 100]."""

    choice: Choice
    site: RouterSite
    ids: Tensor
    live: Tensor
    weights: Weights


CASES = {
    "qwen3-30b-a3b": Case(qwen3_moe, 2048, softmax_weights),
    "deepseek-v3": Case(deepseek_v3, 7168, sigmoid_weights),
    "deepseek-v3-h2048": Case(deepseek_v3, 2048, sigmoid_weights),
}


def substitution(inputs: "Inputs", live: Tensor | None) -> TopKSubstitution:
    """What `r3.attach` opens around a router."""
    return TopKSubstitution(inputs.choice, inputs.ids, live, inputs.site)


def live(router: Any, hidden: Tensor, inputs: "Inputs") -> Outputs:
    return router(hidden)


def replayed(router: Any, hidden: Tensor, inputs: "Inputs") -> Outputs:
    with substitution(inputs, None):
        return router(hidden)


def partly_replayed(router: Any, hidden: Tensor, inputs: "Inputs") -> Outputs:
    with substitution(inputs, inputs.live):
        return router(hidden)


def output_hook(router: Any, hidden: Tensor, inputs: "Inputs") -> Outputs:
    def rewrite(router: Any, args: tuple, output: Outputs) -> Outputs:
        ids = inputs.ids.long()
        return output[0], inputs.weights(router, output[0], ids), ids

    with router.register_forward_hook(rewrite):
        return router(hidden)


VARIANTS = {"live": live, "replayed": replayed, "1% live rows": partly_replayed, "output hook": output_hook}


class Steps:
    """Forward and backward of one router in every variant, on the same input."""

    def __init__(self, case: Case, tokens: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.router = case.build(case.hidden).to(device)
        self.gate = self.router.get_parameter("weight")
        nn.init.normal_(self.gate, std=0.02)
        self.gate.data = self.gate.data.bfloat16()
        if isinstance(self.router, DeepseekV3TopkRouter):
            nn.init.normal_(self.router.e_score_correction_bias, std=0.02)
        self.hidden = torch.randn(tokens, case.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        with torch.no_grad():
            _, weights, chosen = self.router(self.hidden)
        self.direction = torch.randn_like(weights)
        layers = chosen[:, None].expand(-1, LAYERS, -1)
        site = RouterSite(
            name="router", layer_id=0, layer=self.router, router=self.router, owner=self.router, method="forward"
        )
        self.inputs = Inputs(
            choice=prove(site),
            site=site,
            ids=layers.to(torch.uint8).contiguous()[:, 1],
            live=torch.arange(0, tokens, 100, device=device),
            weights=case.weights,
        )

    def step(self, name: str) -> tuple[Tensor, ...]:
        """Weights, ids, and the gradients of the hidden states and the gate."""
        _, weights, ids = VARIANTS[name](self.router, self.hidden, self.inputs)
        return weights, ids, *torch.autograd.grad(weights, [self.hidden, self.gate], self.direction)

    def like_live(self, name: str) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.step("live"), self.step(name), strict=True))


def wall_us(run: Callable[[], object], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e6


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def measure(steps: Steps, rounds: int, times: int, device: torch.device) -> dict[str, dict]:
    """Samples in us of each variant, `eager` and, on a GPU, `gpu`; the variants take turns."""
    kinds: dict[str, dict[str, Callable[[], object]]] = {
        "eager": {name: partial(steps.step, name) for name in VARIANTS}
    }
    if device.type == "cuda":
        kinds["gpu"] = {name: graph_of(run).replay for name, run in kinds["eager"].items()}
    result: dict[str, dict] = {name: {"bit_identical": steps.like_live(name)} for name in VARIANTS}
    for kind, runs in kinds.items():
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            wall_us(run, times, device)
        for turn in range(rounds):
            names = list(runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(wall_us(runs[name], times, device))
        for name, found in samples.items():
            ratios = [one / other for one, other in zip(found, samples["live"], strict=True)]
            result[name][kind] = {"us": spread(found), "ratio": spread(ratios)}
    return result


def show(title: str, result: dict[str, dict]) -> None:
    kinds = [kind for kind in ("eager", "gpu") if kind in result["live"]]
    print(f"\n{title}")
    print(f"{'':14}" + "".join(f"{kind + ' us (p10 to p90)':>30}{'/ live':>8}" for kind in kinds) + "  bits as live")
    for name, row in result.items():
        cells = ""
        for kind in kinds:
            us = row[kind]["us"]
            cells += f"{us['median']:14.1f} ({us['p10']:.1f} to {us['p90']:.1f})".rjust(30)
            cells += f"{row[kind]['ratio']['median']:8.3f}"
        print(f"{name:14}{cells}  {row['bit_identical']}")


def profile(steps: Steps, name: str, device: torch.device, times: int = 10) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    steps.step(name)
    with torch.profiler.profile(activities=activities) as profiler:
        wall_us(lambda: steps.step(name), times, device)
    rows = profiler.key_averages()
    total = sum(row.self_device_time_total if device.type == "cuda" else row.self_cpu_time_total for row in rows)
    print(f"\n{name}: {total / times:.1f} us a step in kernels")
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for row in sorted(rows, key=lambda row: -getattr(row, order.replace("cuda", "device")))[:18]:
        us = getattr(row, order.replace("cuda", "device")) / times
        print(f"{us:10.1f} us {row.count // times:4} x  {row.key[:100]}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a GPU, 512 on a CPU")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--times", type=int, help="steps in a sample (default: 20 on a GPU, 1 on a CPU)")
    parser.add_argument("--matmul", choices=("highest", "high"), default="highest", help="high allows TF32")
    parser.add_argument("--profile", action="store_true", help="print the kernels of live and replayed instead")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = options.tokens or (16384 if device.type == "cuda" else 512)
    times = options.times or (20 if device.type == "cuda" else 1)
    torch.set_float32_matmul_precision(options.matmul)
    about = machine(device) | {"tokens": tokens, "matmul": options.matmul}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = {}
    for name in options.case or CASES:
        steps = Steps(CASES[name], tokens, device)
        if options.profile:
            print(f"\n== {name}")
            for variant in VARIANTS:
                profile(steps, variant, device)
        else:
            results[name] = measure(steps, options.rounds, times, device)
            show(f"{name}: {tokens} tokens, hidden {CASES[name].hidden}, forward and backward", results[name])
    if results:
        print(json.dumps({"benchmark": "router", **about, "cases": results}))


if __name__ == "__main__":
    main()
