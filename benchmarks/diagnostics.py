"""Time of one step's diagnostics, beside a forward and backward of a small stack of a Qwen3-MoE.

    python -m benchmarks.diagnostics
    OMP_NUM_THREADS=1 python -m benchmarks.diagnostics --device cpu --tokens 2048

The diagnostics are those of all tokens of the step: log-probabilities live and replayed, sequences, routing, load,
margins and coverage of `--routing-layers` decoder layers, down to the metrics' values. The stack takes the same tokens
through fewer layers, of Qwen3-30B-A3B's shape on a GPU and much smaller ones on a CPU: a ratio to its step is more than
that to a step of the whole model. All take turns in one run; a ratio is the median over the rounds. The forward without
gradients is also timed recorded, and recorded with margins.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

import r3
from benchmarks.machine import machine, spread
from benchmarks.train_step import TOP_K, build, step_of, timed
from r3.diagnostics import (
    CoverageSums,
    LoadSums,
    LogprobSums,
    MarginSums,
    RoutingSums,
    SequenceSums,
    sequence_totals,
)
from r3.routing import compact_dtype

SHAPE = dict(tokens=16384, sequences=32, routing_layers=48, experts=128)
GPU = SHAPE | dict(layers=8, length=4096, hidden=2048, stack_experts=128, intermediate=768, vocab=32768, rounds=15)
CPU = SHAPE | dict(layers=2, length=128, hidden=256, stack_experts=16, intermediate=64, vocab=512, rounds=5)
DIFFERING = 0.1  # share of (token, layer) pairs whose routing differs, as published for Qwen3-30B-A3B


class Step:
    """Random data of a step's diagnostics `[B, S]`, B sequences, on one device."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (options.sequences, options.tokens // options.sequences)
        n_layers, self.experts, self.layer_ids = options.routing_layers, options.experts, range(options.routing_layers)
        self.rollout = -torch.empty(shape, device=device).exponential_(1.0, generator=generator)
        noise = torch.randn((2, *shape), device=device, generator=generator)
        self.live, self.replayed = (self.rollout + 0.01 * noise).clamp_max(0)
        self.mask = torch.rand(shape, device=device, generator=generator) < 0.9
        self.tokens = torch.ones_like(self.mask)
        self.versions = torch.zeros(shape, dtype=torch.int32, device=device)
        self.sequence_ids = torch.arange(shape[0], device=device)[:, None].expand(shape)
        # A layer at a time: the scores of all would be larger than what is measured.
        ids = torch.stack(
            [
                torch.rand((*shape, self.experts), device=device, generator=generator).topk(TOP_K).indices
                for _ in self.layer_ids
            ],
            -2,
        )
        self.ids = ids.to(compact_dtype(self.experts))
        other = ids.clone()
        differs = torch.rand(ids.shape[:-1], device=device, generator=generator) < DIFFERING
        other[..., 0] = torch.where(differs, (ids.amax(-1) + 1) % self.experts, ids[..., 0])
        distinct = (other.sort(-1).values.diff(dim=-1) > 0).all(-1, keepdim=True)
        self.rolled_out = other.where(distinct, ids).to(self.ids.dtype)
        self.margins = torch.rand((*shape, n_layers), device=device, generator=generator)

    def logprobs(self, train: Tensor) -> dict[str, float]:
        return LogprobSums.from_tensors(train, self.rollout, self.mask).metrics()

    def sequences(self) -> dict[str, float]:
        count = len(self.rollout)
        totals = sequence_totals(self.replayed - self.rollout, self.mask, self.sequence_ids, count)
        return SequenceSums.from_totals(*totals).metrics()

    def routing(self) -> dict[str, float]:
        return RoutingSums.from_tensors(self.ids, self.rolled_out, self.tokens).metrics()

    def load(self) -> dict[str, float]:
        ids = dict(num_experts=self.experts, layer_ids=self.layer_ids)
        return LoadSums.from_tensors(self.ids, self.rolled_out, self.tokens, **ids).metrics()

    def margin(self) -> dict[str, float]:
        return MarginSums.from_tensors(self.margins, self.ids, self.rolled_out, self.tokens).metrics()

    def coverage(self) -> dict[str, float]:
        return CoverageSums.from_tensors(self.tokens, self.tokens, self.versions, 0).metrics()

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "log-probabilities, live": lambda: self.logprobs(self.live),
            "log-probabilities, replayed": lambda: self.logprobs(self.replayed),
            "sequences": self.sequences,
            "routing": self.routing,
            "load": self.load,
            "margins": self.margin,
            "coverage": self.coverage,
        }


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    step = Step(options, device)
    parts = step.parts()
    options.batch = options.tokens // options.length
    model = build(argparse.Namespace(**vars(options) | {"experts": options.stack_experts}), device)
    tokens = torch.randint(0, options.vocab, (options.batch, options.length), device=device)
    train = step_of(model, tokens, None)

    @torch.no_grad()
    def forward(**recorded: bool) -> None:
        if not recorded:
            model(input_ids=tokens, use_cache=False)
            return
        with r3.record(model, **recorded):
            model(input_ids=tokens, use_cache=False)

    runs = {
        "forward and backward": train,
        "all diagnostics": lambda: [part() for part in parts.values()],
        "forward": forward,
        "forward, recorded": lambda: forward(margins=False),
        "forward, recorded with margins": lambda: forward(margins=True),
        **parts,
    }
    # Proving the routers once a context is not what is measured: an outer recorder keeps them instrumented.
    with r3.record(model):
        for run in runs.values():
            run()
        peak = timed(runs["all diagnostics"], device)[1]
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                samples[name].append(timed(runs[name], device)[0])

    def ratio(name: str, base: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(samples[name], samples[base], strict=True)])

    return {
        "ms": {name: spread(found) for name, found in samples.items()},
        "ratio": {
            "all diagnostics / forward and backward": ratio("all diagnostics", "forward and backward"),
            "recorded / plain forward": ratio("forward, recorded", "forward"),
            "recorded with margins / plain forward": ratio("forward, recorded with margins", "forward"),
        },
        "peak_bytes": peak,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")
    for name in GPU:
        key = name.replace("_", "-")
        parser.add_argument(f"--{key}", type=int, help=f"default: {CPU[name]} on a CPU, {GPU[name]} on a GPU")
    options = parser.parse_args()
    for name, value in (GPU if options.device == "cuda" else CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    about = machine(device) | vars(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    result = measure(options, device)
    for name, ms in result["ms"].items():
        print(f"{name:32} {ms['median']:9.2f} ms ({ms['p10']:.2f} to {ms['p90']:.2f})")
    for name, ratio in result["ratio"].items():
        print(f"{name}: {ratio['median']:.4f} ({ratio['p10']:.4f} to {ratio['p90']:.4f})")
    if result["peak_bytes"]:
        print(f"peak of the diagnostics, model included: {result['peak_bytes'] / 2**30:.3f} GiB")
    print(json.dumps({"benchmark": "diagnostics", **about, **result}))


if __name__ == "__main__":
    main()
