"""Head and log-probabilities of a training step: all logits in float32, and fused in chunks.

    python -m benchmarks.head
    python -m benchmarks.head --small          # on a CPU
    python -m benchmarks.head --vocab 151937   # divisible by nothing

Plain: a float32 product of float32 weights, and `token_logprobs` of all logits. Fused: `head_logprobs` of bfloat16
weights. Both get the same bfloat16 values, an upstream gradient for each token, and labels drawn from the distribution;
they take turns in one run. Errors are against float64: of all log-probabilities, of the hidden states' gradient on a
sample of tokens, of the weight's on a sample of its rows. One JSON line for each way and size.

Predicted for 16,384 tokens, hidden 2048, vocabulary 151,936 on an H200, before the first run. A product has 10.2 TFLOP:
196 ms in float32 and 15 to 16 in bfloat16. Plain: three products, 590 ms, and about ten passes over 10 GB of logits, 40
ms: 630 ms. Fused: four products, 62 ms; statistics read the logits once, 2.5 ms; their gradient reads float32 and
writes bfloat16, 4 ms; the weight's gradient is read and written once a chunk, 10 times 0.6 ms. 75 ms: 0.12 of plain.
With hidden 1024 products are half and passes are not: 330 and 42 ms, 0.13. Peak beyond inputs: 50 to 60 GB, and 1.6 GB
of a chunk with 2 GB of the weight's gradient. Log-probabilities err by some 1e-6 nats in both ways; the fused gradients
by 2e-3 of their norm, which is the rounding of bfloat16, in which they are handed on.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine, spread
from r3.parallel import head_logprobs, head_scores, token_logprobs

TEMPERATURE = 0.8
SAMPLE = 256  # tokens, and rows of the weight, whose gradients are compared
REFERENCE_BYTES = 1 << 30  # of the float64 logits in memory at once


@dataclass
class Case:
    """Inputs `[N, H]`, `[V, H]`, `[N]` and `[N]`, and float64 answers."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    logprobs: Tensor
    hidden_gradient: Tensor  # of the first SAMPLE tokens
    weight_gradient: Tensor  # of the first SAMPLE rows

    @classmethod
    @torch.no_grad()
    def of(cls, tokens: int, hidden_size: int, vocabulary: int, device: torch.device) -> "Case":
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()

        hidden = random(tokens, hidden_size, scale=3.0)  # logits of standard deviation 3
        weight = random(vocabulary, hidden_size, scale=hidden_size**-0.5)
        upstream = torch.randn(tokens, generator=generator, device=device) / tokens
        exact, chunk = weight.double(), max(1, REFERENCE_BYTES // (8 * vocabulary))
        labels = torch.empty(tokens, dtype=torch.int64, device=device)
        logprobs = torch.empty(tokens, dtype=torch.float64, device=device)
        of_hidden, of_weight = exact.new_zeros(tokens, hidden_size), torch.zeros_like(exact[:SAMPLE])
        for start in range(0, tokens, chunk):
            at = slice(start, start + chunk)
            logs = (hidden[at].double() @ exact.t() / TEMPERATURE).log_softmax(1)
            noise = torch.empty(logs.shape, device=device).exponential_(generator=generator)
            labels[at] = (logs - noise.log()).argmax(1)
            logprobs[at] = logs.gather(1, labels[at, None])[:, 0]
            gradient = F.one_hot(labels[at], vocabulary) - logs.exp_()
            gradient *= upstream[at, None] / TEMPERATURE
            of_weight += gradient[:, :SAMPLE].t() @ hidden[at].double()
            if start < SAMPLE:
                of_hidden[at] = gradient @ exact
        return cls(hidden, weight, labels, upstream, logprobs, of_hidden[:SAMPLE], of_weight)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(F.linear(hidden.float(), weight), labels, temperature=TEMPERATURE)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_mib: int) -> Tensor:
    return head_logprobs(hidden, weight, labels, temperature=TEMPERATURE, chunk_bytes=chunk_mib << 20)


def detailed(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_mib: int) -> Tensor:
    return head_scores(hidden, weight, labels, temperature=TEMPERATURE, chunk_bytes=chunk_mib << 20).logprobs


class Way:
    """One way to compute them, on leaves of its own."""

    def __init__(self, name: str, run: Callable[..., Tensor], case: Case, dtype: torch.dtype, **options: int) -> None:
        self.name, self.options, self._run, self._case, self._dtype = name, options, run, case, dtype
        self.samples: dict[str, list[float]] = {"forward": [], "backward": []}
        self.peak = 0
        self.errors: dict[str, float] = {}

    def step(self, *, keep: bool) -> None:
        """A forward and a backward pass, counted if `keep`."""
        case, device = self._case, self._case.hidden.device
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.to(self._dtype, copy=True).requires_grad_()
        before = begin(device)
        start = time.perf_counter()
        logprobs = self._run(hidden, weight, case.labels, **self.options)
        middle = now(device)
        (logprobs * case.upstream).sum().backward()
        end = now(device)
        if keep:
            self.samples["forward"].append(middle - start)
            self.samples["backward"].append(end - middle)
            return
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device) - before
        self.errors = {
            "logprob_max_nats": float((logprobs.detach() - case.logprobs).abs().max()),
            "hidden_gradient": off(hidden.grad, case.hidden_gradient),
            "weight_gradient": off(weight.grad, case.weight_gradient),
        }

    def result(self) -> dict:
        tokens, hidden_size = self._case.hidden.shape
        product = 2 * tokens * hidden_size * len(self._case.weight) / 1e12
        seconds = {name: spread(found) for name, found in self.samples.items()}
        total = sum(found["median"] for found in seconds.values())
        return {
            "way": self.name,
            **self.options,
            "seconds": seconds | {"both": round(total, 5)},
            # Of three products, whatever is computed again.
            "tflops": {name: round(products * product / seconds[name]["median"], 1) for name, products in PRODUCTS},
            "peak_bytes": self.peak,
            "error": self.errors,
        }


PRODUCTS = (("forward", 1), ("backward", 2))


def off(found: Tensor | None, expected: Tensor) -> float:
    """Error of the first rows, relative to their norm."""
    assert found is not None
    return float((found[: len(expected)] - expected).norm() / expected.norm())


def begin(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(options: argparse.Namespace, hidden_size: int, device: torch.device) -> list[dict]:
    case = Case.of(options.tokens, hidden_size, options.vocab, device)
    ways = [Way("plain", plain, case, torch.float32)]
    ways += [Way("fused", fused, case, torch.bfloat16, chunk_mib=mib) for mib in options.chunk_mib]
    ways.append(Way("fused, with entropy and margin", detailed, case, torch.bfloat16, chunk_mib=options.chunk_mib[0]))
    for way in ways:
        way.step(keep=False)
    for turn in range(options.rounds):
        for way in ways[:: 1 if turn % 2 else -1]:
            way.step(keep=True)
    results = [way.result() for way in ways]
    base = results[0]
    for result in results[1:]:
        result["time_ratio"] = round(result["seconds"]["both"] / base["seconds"]["both"], 4)
        if base["peak_bytes"]:
            result["peak_ratio"] = round(result["peak_bytes"] / base["peak_bytes"], 4)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--chunk-mib", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    small = dict(tokens=256, hidden=[64], vocab=4099, chunk_mib=[1])
    large = dict(tokens=16384, hidden=[2048, 1024], vocab=151936, chunk_mib=[1024, 512, 2048])
    for name, value in (small if options.small else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device) | {"tokens": options.tokens, "vocab": options.vocab, "rounds": options.rounds}
    for hidden_size in options.hidden:
        for result in measure(options, hidden_size, device):
            print(json.dumps({"benchmark": "head", **about, "hidden": hidden_size, **result}))


if __name__ == "__main__":
    main()
