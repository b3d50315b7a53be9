"""What does an FP8 engine add to the training-inference gap, and does a weight sync leave it as it was?

    python -m benchmarks.fp8_gap            # one GPU that computes in FP8 (H100, H200)
    python -m benchmarks.fp8_gap --plain    # any: both engines in bf16; on a CPU with a small checkpoint in --folder

A small Qwen3-MoE is trained (`benchmarks.language_models`; the checkpoint of `benchmarks.gap` is used if it is there)
and quantised on the CPU: e4m3, a scale for each 128 x 128 block. The trainer is in bfloat16. Two engines, one after the
other, sample from the same prompts:

- bf16: of the trainer's checkpoint;
- fp8: of the quantised checkpoint;
- fp8 synced: the same engine, after r3 has quantised and sent the trainer's weights, which have not changed;
- fp8 stale: what "fp8" sampled, scored by the trainer after `--updates` updates on random advantages;
- fp8 updated: the same engine after a second sync, of these weights.

One JSON line for each of them and way, live and replayed: k3 in nats, its standard error, the share of tokens whose
log-probability is not the engine's, the largest difference, the share of extreme tokens (ratio over 2), and, live,
`differing_rows`: the share of (token, layer) pairs in which the trainer chooses other experts than the engine did. One
line for each sync, and one for the share of bfloat16 weights, and of FP8 numbers, that the updates changed.

It checks itself. A number that is not finite, or a sync of another version, ends it at once. At its end it fails if
replay did not lower k3 of bf16, or by what the engine says greedily, of one prompt at a time (tokens, log-probabilities
and experts, to the last bit): if it does not repeat itself; if the first sync changed it, since r3's numbers are then
not the checkpoint's; if the second did not.

Predicted before the first run, on an H200: bf16 k3 3.5e-4 live and 3.5e-5 replayed, 5% of rows differing. FP8 rounds 16
times as coarsely, so 40% of rows differ and k3, which is of second order, is 8e-3 live and 4e-3 replayed: replay takes
half where it took nine tenths, as most is now in the numbers and not in the routes. Extreme tokens 1e-4 live of bf16;
of FP8 5e-3 live and 2e-3 replayed. The first sync changes no bit. Eight updates at 1e-5 change 30% of the bfloat16
weights and 3% of the FP8 numbers; synced, k3 is what it was, within two standard errors. Stale, it is 10% more.
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
from r3.diagnostics import compare_routing
from r3.weight_sync import WeightSync, gathered, named_weights, quantised

GREEDY_PROMPTS, GREEDY_TOKENS = 4, 64


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
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *routers],
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    named = quantised(named_weights(model), config)
    made = folder.with_name(f"{folder.name}-fp8")
    made.mkdir(exist_ok=True)
    save_file({name: gathered(source).contiguous().clone() for name, source in named}, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(config))
    return made


def numbers(named: list[tuple[str, Any]], dtype: torch.dtype) -> Tensor:
    """Float32, end to end: of all weights that are of `dtype`."""
    made = (gathered(source) for _, source in named)
    return torch.cat([tensor.flatten().float() for tensor in made if tensor.dtype == dtype])


class Pair:
    """The trainer and a running engine of its weights."""

    def __init__(self, trainer: Scorer, engine: Any, config: Any, options: argparse.Namespace) -> None:
        self.trainer, self.engine, self.config, self.options = trainer, engine, config, options
        self.prompts = prompts_of(options)

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
            batch = self.sample([prompt], temperature=0.0, max_tokens=min(GREEDY_TOKENS, self.options.length))
            found += [batch.input_ids, batch.logprobs, batch.routing.expert_ids]
        return found

    def says(self, before: list[Tensor]) -> bool:
        """Whether the engine still says the same, greedily, to the last bit."""
        return all(map(torch.equal, before, self.greedy()))

    def named(self) -> list[tuple[str, Any]]:
        """The trainer's weights as this engine holds them."""
        weights, folder = named_weights(self.trainer.model, fused_experts=True), self.config.trainer.policy.model.path
        if self.options.plain:
            return weights
        return quantised(weights, json.loads(Path(folder, "config.json").read_text()), checkpoint=folder)

    def push(self, sync: WeightSync, version: int) -> None:
        receipt = sync.push(self.named(), version=version)
        if not receipt.version == sync.version == version:
            raise SystemExit(f"fp8_gap: expected a sync of version {version}, got {receipt.version}, {sync.version}")
        line = {"sync": version, "tensors": receipt.tensors, "seconds": round(receipt.seconds, 3)}
        print(json.dumps(line), flush=True)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Those of the trainer's weights, and those in FP8 that are sent."""
        sent = torch.bfloat16 if self.options.plain else torch.float8_e4m3fn
        return numbers(named_weights(self.trainer.model), torch.bfloat16), numbers(self.named(), sent)

    def compare(self, batch: Any, name: str) -> dict[str, float]:
        """Print the gap of a batch; k3 live and replayed."""
        routing, live = self.trainer.record(batch)
        with torch.no_grad():
            ways = {"live": live, "replayed": self.trainer.logprobs(batch, batch.routing)}
        rows = compare_routing(routing.expert_ids, batch.routing.expert_ids, batch.routing.valid)
        sampled = batch.logprobs[batch.response_mask].to(live.device)
        found = {way: difference((logprobs - sampled).double()) for way, logprobs in ways.items()}
        if not all(math.isfinite(number) for figures in found.values() for number in figures.values()):
            raise SystemExit(f"fp8_gap: expected finite numbers of {name}, got {found}")
        tell(name, "live", found["live"] | {"differing_rows": rows["differing_rows"]})
        tell(name, "replayed", found["replayed"])
        return {way: figures["k3"] for way, figures in found.items()}


def measure(pair: Pair, sync: WeightSync, name: str) -> list[str]:
    """Print the figures of one engine through two syncs; what is wrong with them."""
    options, trainer = pair.options, pair.trainer
    first = pair.greedy()
    repeats = pair.says(first)
    held = pair.sample()
    pair.compare(held, name)

    pair.push(sync, 1)
    same = pair.says(first)
    print(json.dumps({"engine": name, "repeats_itself": repeats, "equal_after_sync_of_same": same}), flush=True)
    training = pair.sample()
    pair.compare(training, f"{name} synced")

    old = pair.numbers()
    master = Master(trainer.model, options.lr, options.device)
    for update in range(options.updates):
        master.update(trainer, training.select(slice(update, None, options.updates)), update)
    own, sent = ((a != b).double().mean().item() for a, b in zip(old, pair.numbers(), strict=True))
    print(json.dumps({"updates": options.updates, "bf16_changed": own, "sent_changed": sent}), flush=True)
    pair.compare(held, f"{name} stale")
    pair.push(sync, 2)
    moved = not pair.says(first)
    pair.compare(pair.sample(), f"{name} updated")
    checks = {
        f"the {name} engine to repeat itself": repeats,
        "a sync of unchanged weights to change no bit": same,
        "a sync of updated weights to change what the engine says": moved,
    }
    return [f"expected {check}" for check, passed in checks.items() if not passed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=512, help="sampled tokens of each")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--transport", help="of the syncs; default: ipc on a GPU, files elsewhere")
    parser.add_argument("--plain", action="store_true", help="a bf16 engine in place of the FP8 one")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs, as on a CPU")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "r3-gap")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    options.device = "cuda" if gpu else "cpu"
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
    eager = f"generator.inference_engine.enforce_eager={str(options.eager or not gpu).lower()}"

    config = settings(folder, "own", options, eager)
    with byte_engine(config) as engine:
        pair = Pair(trainer, engine, config, options)
        k3 = pair.compare(pair.sample(), "bf16")
    wrong = [] if k3["replayed"] < k3["live"] else [f"expected replay to lower k3 of bf16, got {k3}"]

    config = settings(other, "own", options, eager)
    with byte_engine(config) as engine:
        sync = WeightSync(engine, transport=options.transport or ("ipc" if gpu else "files"), dtype=torch.bfloat16)
        with contextlib.closing(sync):
            wrong += measure(Pair(trainer, engine, config, options), sync, "plain" if options.plain else "fp8")
    if wrong:
        raise SystemExit("fp8_gap: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
