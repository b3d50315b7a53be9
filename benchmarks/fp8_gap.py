"""What does an FP8 engine add to the training-inference gap, and does a weight sync keep it there?

    python -m benchmarks.fp8_gap                                    # one GPU that computes in FP8 (H100, H200)
    python -m benchmarks.fp8_gap --plain --sequences 8 --length 16  # any machine: that it runs; both engines are bf16

A small Qwen3-MoE is trained (`benchmarks.language_models`; the checkpoint of `benchmarks.gap` is used if it is there),
and quantised on the CPU: e4m3, a scale for each 128 x 128 block. The trainer is in bfloat16. Engines, one after the
other, sample from the same prompts:

- bf16: of the trainer's checkpoint;
- fp8: of the quantised checkpoint;
- fp8 synced: the same engine after r3 has quantised and sent the trainer's weights, which have not changed;
- fp8 updated: the same after `--updates` updates of the trainer on random advantages, and a second sync;
- fp8 stale: what "fp8" sampled, scored by the updated trainer, as if the second sync had been left out.

One JSON line for each engine and way, live and replayed: k3 in nats, its standard error, the largest difference, the
share of extreme tokens (ratio over 2); and `differing_rows`, the share of (token, layer) pairs in which the trainer's
live choice is not the engine's. One line for each sync: its version and seconds, and the share of bfloat16 weights and
of the numbers sent that are not those of the sync before. One for what the engine says, greedily, of one prompt at a
time: whether tokens, log-probabilities and experts are equal to the last bit.

It checks itself. A number that is not finite, or a sync of another version, ends it at once. At its end it fails if
replay did not lower k3 of the bf16 engine; if the fp8 engine does not repeat itself, or did so but for the sync of
unchanged weights: then r3's numbers are not the checkpoint's; or if the second sync changed nothing that it says.

Predicted before the first run, on an H200: bf16 k3 3.5e-4 live and 3.5e-5 replayed, 5% of rows differing. FP8 rounds 16
times as coarsely, so rows differ 40%, and k3, which is of second order, is 8e-3 live and 4e-3 replayed: replay takes
half, where it took nine tenths, as most is now in the numbers and not in the routes. Extreme tokens 1e-4 live of bf16;
of FP8 5e-3 live and 2e-3 replayed. The first sync changes no bit. Eight updates at 1e-5 change 30% of the bfloat16
weights and 2% of the FP8 numbers; synced, k3 is what it was, within two standard errors. Stale, it is 10% more.
"""

import argparse
import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.freshness import Master, Scorer
from benchmarks.gap import byte_engine, checkpoint, difference, prompts_of, sampling_of, settings, tell
from benchmarks.machine import machine
from r3.diagnostics import compare_logprobs, compare_routing
from r3.weight_sync import WeightSync, gathered, named_weights, quantised

BLOCK = [128, 128]
FP8 = torch.float8_e4m3fn
BITS = {FP8: torch.uint8, torch.bfloat16: torch.int16}
GREEDY_PROMPTS = 4


def quantise(folder: Path) -> Path:
    """The FP8 checkpoint beside that of `folder`: all linear layers but the routers and the head."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"])]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": BLOCK,
        "modules_to_not_convert": ["lm_head", *routers],
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    named = quantised(named_weights(model), config)
    made = folder.with_name(f"{folder.name}-fp8")
    made.mkdir(exist_ok=True)
    save_file({name: gathered(source).contiguous().clone() for name, source in named}, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(config))
    return made


def numbers(named: list[tuple[str, Any]], dtype: torch.dtype) -> list[Tensor]:
    """The bits of all weights that are of `dtype`."""
    made = (gathered(source) for _, source in named)
    return [tensor.flatten().view(BITS[dtype]).clone() for tensor in made if tensor.dtype == dtype]


def changed(before: list[Tensor], after: list[Tensor]) -> float:
    """The share of numbers that are not equal."""
    differ = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return differ / sum(len(a) for a in before)


class Sampler:
    """A running engine, what it samples, and r3's sync into it."""

    def __init__(self, engine: Any, config: Any, trainer: Scorer, options: argparse.Namespace) -> None:
        self.engine, self.config, self.trainer, self.plain = engine, config, trainer, options.plain
        self.prompts = prompts_of(options)
        self.numbers: tuple[list[Tensor], list[Tensor]] = ([], [])

    def sample(self, prompts: list[Any] | None = None, **sampling: Any) -> Any:
        """A batch of rollouts, one of each prompt."""
        from r3.capture import collect

        params = sampling_of(self.config, **sampling)
        outputs = self.engine.generate(prompts or self.prompts, params, use_tqdm=False)
        return collect(outputs, self.trainer.replay.spec).batch(0)

    def greedy(self) -> list[Tensor]:
        """Tokens, log-probabilities and experts: of one prompt at a time, since other batches may give other bits."""
        found = []
        for prompt in self.prompts[:GREEDY_PROMPTS]:
            self.engine.reset_prefix_cache()
            batch = self.sample([prompt], temperature=0.0)
            found += [batch.input_ids, batch.logprobs, batch.routing.expert_ids]
        return found

    def named(self) -> list[tuple[str, Any]]:
        """The trainer's weights as this engine holds them."""
        from transformers import AutoConfig

        weights = named_weights(self.trainer.model, fused_experts=True)
        folder = self.config.trainer.policy.model.path
        return weights if self.plain else quantised(weights, AutoConfig.from_pretrained(folder), checkpoint=folder)

    def push(self, sync: WeightSync, version: int) -> None:
        receipt = sync.push(self.named(), version=version)
        if (receipt.version, sync.version) != (version, version):
            raise SystemExit(f"fp8_gap: expected a sync of version {version}, got {receipt.version}, {sync.version}")
        own = numbers(named_weights(self.trainer.model), torch.bfloat16)
        sent = numbers(self.named(), torch.bfloat16 if self.plain else FP8)
        line: dict[str, Any] = {"sync": version, "tensors": receipt.tensors, "seconds": round(receipt.seconds, 2)}
        if version > 1:
            line |= {"bf16_changed": changed(self.numbers[0], own), "sent_changed": changed(self.numbers[1], sent)}
        self.numbers = (own, sent)
        print(json.dumps(line), flush=True)


def equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(map(torch.equal, before, after))


def compare(trainer: Scorer, batch: Any, engine: str) -> tuple[float, float]:
    """Print the gap of a batch; k3 live and replayed."""
    routing, live = trainer.record(batch)
    with torch.no_grad():
        ways = {"live": live, "replayed": trainer.logprobs(batch, batch.routing)}
    rows = compare_routing(routing.expert_ids, batch.routing.expert_ids, batch.routing.valid)
    sampled = batch.logprobs[batch.response_mask].to(live.device)
    found = []
    for way, logprobs in ways.items():
        figures = difference((logprobs - sampled).double())
        if not all(map(math.isfinite, figures.values())):
            raise SystemExit(f"fp8_gap: expected finite numbers of {engine}, {way}, got {figures}")
        extreme = compare_logprobs(logprobs, sampled, torch.ones_like(sampled, dtype=torch.bool))["extreme_frac"]
        differing = {"differing_rows": rows["differing_rows"]} if way == "live" else {}
        found.append(tell(engine, way, figures | {"extreme_frac": extreme} | differing)["k3"])
    return found[0], found[1]


def measure_fp8(sampler: Sampler, sync: WeightSync, options: argparse.Namespace) -> list[str]:
    """Print the figures of one engine through two syncs; what is wrong with them."""
    trainer, wrong = sampler.trainer, []
    name = "bf16 again" if options.plain else "fp8"
    first = sampler.greedy()
    repeats = equal(first, sampler.greedy())
    held = sampler.sample()
    compare(trainer, held, name)

    sampler.push(sync, 1)
    same = equal(first, sampler.greedy())
    print(json.dumps({"engine": name, "repeats_itself": repeats, "equal_after_sync_of_same": same}), flush=True)
    if not repeats:
        wrong.append(f"expected {name} to repeat itself, so that bits tell what a sync does")
    if not same:
        wrong.append("expected the sync of unchanged weights to change no bit")
    training = sampler.sample()
    compare(trainer, training, f"{name} synced")

    master = Master(trainer.model, options.lr, options.device)
    for update in range(options.updates):
        part = training.select(slice(update, None, options.updates))
        master.update(trainer, part, update)
    compare(trainer, held, f"{name} stale")
    sampler.push(sync, 2)
    moved = not equal(first, sampler.greedy())
    print(json.dumps({"engine": name, "updates": options.updates, "changed_by_sync": moved}), flush=True)
    if not moved:
        wrong.append("expected the sync of updated weights to change what the engine says")
    compare(trainer, sampler.sample(), f"{name} updated")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=512, help="sampled tokens of each")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--plain", action="store_true", help="a bf16 engine in place of the FP8 one")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs, as on a CPU")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "r3-gap")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # A fork of a process whose threads have computed can stand still in the engine.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    from transformers import AutoModelForCausalLM

    from r3.experts import use_experts

    print(json.dumps(machine(torch.device(options.device))), flush=True)
    folder = checkpoint("qwen3_moe", options.seed, options)
    other = folder if options.plain else quantise(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    use_experts(model)
    trainer = Scorer(model, options.device)
    eager = options.eager or options.device == "cpu"
    of_engine = f"generator.inference_engine.enforce_eager={str(eager).lower()}"
    wrong = []

    config = settings(folder, "own", options, of_engine)
    with byte_engine(config) as engine:
        batch = Sampler(engine, config, trainer, options).sample()
    live, replayed = compare(trainer, batch, "bf16")
    if not replayed < live:
        wrong.append(f"expected replay to lower k3 of bf16, got {live:.3g}, replayed {replayed:.3g}")

    config = settings(other, "own", options, of_engine)
    transport = "ipc" if options.device == "cuda" else "files"
    with byte_engine(config) as engine:
        sync = WeightSync(engine, transport=transport, dtype=torch.bfloat16)
        with contextlib.closing(sync):
            wrong += measure_fp8(Sampler(engine, config, trainer, options), sync, options)
    if wrong:
        raise SystemExit("fp8_gap: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
