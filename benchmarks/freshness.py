"""What replay is worth as the trainer moves away from the weights that sampled: its own error, and its gradients'.

    python -m benchmarks.freshness                    # the demo model on a CPU, 3 seeds
    python -m benchmarks.freshness --model /my/moe --lr 1e-5 --device cuda --figure freshness.png

An engine samples rollouts once. A trainer in bfloat16 then takes updates on other rollouts of the same weights, and
after 0, 1, 2, 4 ... 64 of them its ratio of probabilities to the rollout is compared with the true one: of a float32
copy of the trainer with its own routing, now and before the first update. Three ways to route:

- live: the trainer's own choice, now;
- replayed: the rollout's (R3);
- own: the trainer's own choice before the first update, replayed (R2).

One JSON line for each way and number of updates, over all seeds: `error_k3`, the mean of exp(e) - 1 - e where e is the
error of the log-ratio in nats, and what it is by seed; `cosine`, between the gradient of the ratio's policy loss and
that of the float32 copy, over all parameters; `routes_moved`, the share of (token, layer) pairs in which the float32
copy now chooses other experts than before the first update; `differing_rows`, the share in which the trainer's live
choice is not the rollout's, which a run records as `routing/differing_rows`; `moved`, the distance from the first
weights over their norm. `--figure` draws errors and cosines over the updates.

It checks itself: before the first update replay must have less error than live routing, and the float32 copy's ratios
must be exactly 1.

Predicted before the first run, on the demo model at its own learning rate: error 5e-5 live whatever the number of
updates, since flips come from rounding; replayed 6e-6 at first, growing with the square of the distance as the true
policy takes other experts, and crossing live routing's after some 16 updates, at a few percent of routes moved. R2
starts higher than R3, at half of live (one side's flips are left), and then grows with it. Gradients: cosines of 0.99
and more for all at first, falling for replayed ones where the errors cross.
"""

import argparse
import copy
import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.language_models import sampled_logprobs
from benchmarks.machine import machine
from r3.diagnostics import compare_routing

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "chain_sum_moe"
QUESTION = "State the final answer to the following arithmetic problem: {} + {} - {} =\n"
WAYS = ("live", "replayed", "own")
UPDATES = (0, 1, 2, 4, 8, 16, 32, 64)


def sample(options: argparse.Namespace, spec: Any) -> list[Any]:
    """Batches of rollouts, the first of each seed to measure with, the others to train on."""
    import vllm
    from transformers import AutoTokenizer

    import r3
    from r3.capture import collect, running_engine

    overrides = [f"generator.inference_engine.max_num_seqs={options.rollouts}"]
    config = r3.R3Config.from_overrides(overrides, {"trainer.policy.model.path": str(options.model)})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    generator = torch.Generator().manual_seed(1)
    found = []
    with running_engine(config) as engine:
        sampling = vllm.SamplingParams(**r3.capture.sampling_kwargs(config) | {"n": 1})
        for _ in range(len(options.seeds) * (1 + options.batches)):
            terms = torch.randint(10, 100, (options.rollouts, 3), generator=generator).tolist()
            prompts = [{"prompt_token_ids": tokenizer(QUESTION.format(*row)).input_ids} for row in terms]
            found.append(collect(engine.generate(prompts, sampling, use_tqdm=False), spec).batch(0))
    return found


class Scorer:
    """A model with replay and a float32 head, and what it gives for a batch."""

    def __init__(self, model: nn.Module, device: str) -> None:
        import r3
        from r3.parallel import fused_head

        self.model = model.to(device)
        self.replay = r3.attach(self.model)
        self.head = fused_head(self.model)
        self.device = device

    def logprobs(self, batch: Any, routing: Any = None) -> Tensor:
        """Float32 `[tokens]` of the sampled tokens."""
        scored = sampled_logprobs(self.model, self.head, batch, routing, self.device)
        return scored[batch.response_mask.to(self.device)]

    def record(self, batch: Any) -> Any:
        """The model's own routing of `batch`, and its log-probabilities."""
        import r3

        with torch.no_grad(), r3.record(self.model) as recorder:
            logprobs = self.logprobs(batch)
        return recorder.routing, logprobs

    def gradient(self, loss: Tensor) -> Tensor:
        """Float32, of all parameters end to end."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        return torch.cat([part.float().flatten() for part in parts])


class Master:
    """Float32 weights under AdamW, of which bfloat16 models take a copy after each update."""

    def __init__(self, model: nn.Module, lr: float, device: str) -> None:
        self.weights = [p.detach().to(device, torch.float32, copy=True).requires_grad_() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self, trainer: Scorer, batch: Any, seed: int, *others: Scorer) -> None:
        """One step of `trainer` on replayed rollouts with random advantages; `others` take its weights, too."""
        loss = policy_loss(
            trainer.logprobs(batch, batch.routing),
            batch.logprobs[batch.response_mask].to(trainer.device),
            advantages_of(batch, seed, trainer.device),
        )
        trainer.model.zero_grad(set_to_none=True)
        loss.backward()
        for weight, parameter in zip(self.weights, trainer.model.parameters(), strict=True):
            weight.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        for scorer in (trainer, *others):
            with torch.no_grad():
                for weight, parameter in zip(self.weights, scorer.model.parameters(), strict=True):
                    parameter.copy_(weight)


def policy_loss(logprobs: Tensor, before: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages * (logprobs - before).exp()).mean()


def advantages_of(batch: Any, seed: int, device: str) -> Tensor:
    """`[tokens]`: one number a rollout, standard normal."""
    of_rollouts = torch.randn(len(batch.input_ids), 1, generator=torch.Generator().manual_seed(seed))
    return of_rollouts.expand(batch.response_mask.shape)[batch.response_mask].to(device)


def measure(seed: int, batches: list[Any], options: argparse.Namespace) -> dict[tuple[int, str], dict[str, float]]:
    """What one seed gives, by number of updates and way."""
    from transformers import AutoModelForCausalLM

    held, training = batches[0], batches[1:]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    first = torch.cat([p.detach().flatten() for p in model.parameters()])
    exact = Scorer(copy.deepcopy(model), options.device)
    trainer = Scorer(copy.deepcopy(model).bfloat16(), options.device)
    master = Master(model, options.lr, options.device)
    advantages = advantages_of(held, seed, options.device)
    sampled = held.logprobs[held.response_mask].to(options.device)
    exact_routing, exact_before = exact.record(held)
    own_routing, own_before = trainer.record(held)
    # Each way against what stands in its denominator: the engine's log-probability, of R2 the trainer's own.
    ways = {"live": (None, sampled), "replayed": (held.routing, sampled), "own": (own_routing, own_before)}
    found: dict[tuple[int, str], dict[str, float]] = {}
    done = 0
    for updates in UPDATES[: options.points]:
        while done < updates:
            master.update(trainer, training[done % len(training)], 1000 * seed + done, exact)
            done += 1
        now, exact_now = exact.record(held)
        ratio = exact_now - exact_before
        if not updates and ratio.any():
            raise SystemExit("freshness: expected ratios of exactly 1 before the first update")
        true = exact.gradient(policy_loss(exact.logprobs(held), exact_before, advantages))
        moved = (now.expert_ids.long().sort(-1).values != exact_routing.expert_ids.long().sort(-1).values).any(-1)
        share = moved[held.attention_mask.bool().to(moved.device)].float().mean().item()
        distance = (torch.cat([w.detach().cpu().flatten() for w in master.weights]) - first).norm() / first.norm()
        chosen, _ = trainer.record(held)
        differing = compare_routing(chosen.expert_ids.cpu(), held.routing.expert_ids, held.routing.valid)[
            "differing_rows"
        ]
        for way, (routing, before) in ways.items():
            logprobs = trainer.logprobs(held, routing)
            gradient = trainer.gradient(policy_loss(logprobs, before, advantages))
            error = (logprobs.detach() - before - ratio).double()
            found[updates, way] = {
                "error_k3": (error.exp() - 1 - error).mean().item(),
                "cosine": F.cosine_similarity(gradient.double(), true.double(), dim=0).item(),
                "routes_moved": share,
                "differing_rows": differing,
                "moved": distance.item(),
            }
    return found


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Error and gradient over the updates: each way is the mean of its seeds, within their extremes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    error, gradient = drawn.subplots(1, 2)
    looks = {"live": ("#d55e00", "s-"), "replayed": ("#0072b2", "o-"), "own": ("#009e73", "^--")}
    for way, (colour, look) in looks.items():
        found = [line for line in lines if line["routing"] == way]
        updates = [line["updates"] for line in found]
        errors = [line["error_k3_by_seed"] for line in found]
        apart = [[1 - cosine for cosine in line["cosine_by_seed"]] for line in found]
        for panel, values in ((error, errors), (gradient, apart)):
            panel.plot(updates, [mean(value) for value in values], look, color=colour, markersize=4, label=way)
            panel.fill_between(
                updates, *zip(*((min(value), max(value)) for value in values), strict=True), color=colour, alpha=0.15
            )
    error.set_title("error of the log-ratio, k3 in nats", fontsize=9)
    gradient.set_title("1 - cosine of the policy gradient", fontsize=9)
    for panel in (error, gradient):
        panel.set_xscale("symlog", linthresh=1, base=2)
        panel.set_yscale("log")
        panel.set_xticks(UPDATES, [str(number) for number in UPDATES])
        panel.set_xlabel("updates since the rollouts were sampled")
        panel.grid(alpha=0.25)
    error.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=64, help="of a batch")
    parser.add_argument("--batches", type=int, default=4, help="that are trained on in turn, for each seed")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--points", type=int, default=len(UPDATES), help="how many of the numbers of updates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    from transformers import AutoModelForCausalLM

    import r3

    print(json.dumps(machine(torch.device(options.device))), flush=True)
    spec = r3.attach(AutoModelForCausalLM.from_pretrained(options.model)).spec
    batches = sample(options, spec)
    each = 1 + options.batches
    by_key: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for number, seed in enumerate(options.seeds):
        torch.manual_seed(seed)
        for key, values in measure(seed, batches[number * each : (number + 1) * each], options).items():
            by_key[key].append(values)
    lines = []
    for (updates, way), values in by_key.items():
        line: dict[str, Any] = {"updates": updates, "routing": way}
        for name in values[0]:
            line[name] = float(f"{mean(value[name] for value in values):.4g}")
        line["error_k3_by_seed"] = [float(f"{value['error_k3']:.3g}") for value in values]
        line["cosine_by_seed"] = [round(value["cosine"], 6) for value in values]
        print(json.dumps(line), flush=True)
        lines.append(line)
    start = {way: mean(value["error_k3"] for value in by_key[0, way]) for way in WAYS}
    if not start["replayed"] < start["live"]:
        raise SystemExit(f"freshness: expected less error replayed than live before the first update, got {start}")
    if options.figure:
        draw(lines, options.figure)


if __name__ == "__main__":
    main()
