"""Small language models of bytes, trained in a minute or two on the C++ headers that come with torch.

    python -m benchmarks.language_models qwen3_moe build/qwen3_moe
    python -m benchmarks.language_models qwen3_30b build/qwen3_30b --steps 0    # random weights, for speed and equality

Random weights show nothing about a gap: their routers are near ties everywhere, and their tokens near uniform. These
models have learnt something, from text that every machine with torch has. A dense twin has the shape of its MoE with
one MLP as wide as the experts that a token uses.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from benchmarks.machine import machine
from r3.experts import use_experts

LENGTH = 512  # bytes of a training sequence
BATCH = 64
VOCABULARY = 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 8, "moe_intermediate_size": 128, "norm_topk_prob": True}
_30B: dict[str, Any] = {
    **_COMMON,
    **_EXPERTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
FAMILIES = ("qwen3_moe", "qwen3", "glm4_moe", "qwen3_30b")


def configuration(family: str) -> Any:
    """The shape of a family: 107M parameters with experts (12M used by a token), 19M as the dense twin.

    `qwen3_30b` is 8 layers of Qwen3-30B-A3B, with its vocabulary.
    """
    if family == "qwen3_30b":
        return Qwen3MoeConfig(**_30B)
    if family == "qwen3_moe":
        return Qwen3MoeConfig(num_experts=64, **_COMMON, **_EXPERTS)
    if family == "qwen3":
        return Qwen3Config(intermediate_size=8 * 128, **_COMMON)
    if family == "glm4_moe":
        return Glm4MoeConfig(
            n_routed_experts=64,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=1,
            intermediate_size=8 * 128,
            use_qk_norm=True,
            partial_rotary_factor=0.5,
            **_COMMON,
            **_EXPERTS,
        )
    raise ValueError(f"family: expected {', '.join(FAMILIES)}, got {family}")


def text() -> Tensor:
    """uint8 `[N]`, torch's own C++ headers end to end, in the order of their names."""
    folder = Path(torch.__file__).parent / "include"
    files = sorted(path for path in folder.rglob("*.h") if path.is_file())
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


@dataclasses.dataclass
class Corpus:
    """Training sequences and prompts, from disjoint parts of the text."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, device: torch.device | str) -> "Corpus":
        bytes_ = text().to(device)
        cut = len(bytes_) * 19 // 20
        return cls(bytes_[:cut], bytes_[cut:])

    def batch(self, size: int, length: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """int64 `[size, length]` from random places."""
        source = self.held_out if held_out else self.train
        starts = torch.randint(len(source) - length, (size, 1), generator=generator)
        return source[(starts + torch.arange(length)).to(source.device)].long()


def train(family: str, steps: int, seed: int, device: torch.device | str = "cuda") -> tuple[PreTrainedModel, float]:
    """A model in bfloat16 after `steps` updates of float32 master weights, and its held-out loss in nats."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    corpus = Corpus.of(device)
    model = AutoModelForCausalLM.from_config(configuration(family), dtype=torch.float32).to(device)
    use_experts(model)
    balanced = {"output_router_logits": True} if isinstance(model.config, Qwen3MoeConfig) else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 1), pct_start=0.1)
    for _ in range(steps):
        ids = corpus.batch(BATCH, LENGTH, generator)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model = model.to(torch.bfloat16).eval()
    with torch.no_grad():
        ids = corpus.batch(16, LENGTH, generator, held_out=True)
        held_out = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    return model, held_out


def sampled_logprobs(model: Any, head: Any, batch: Any, routing: Any, device: torch.device | str) -> Tensor:
    """Float32 `[B, S]` by the handle of `fused_head(model)`: entry t is of token t, 0 where it was not sampled.

    Args:
        batch: of rollouts, with padding at the end.
        routing: to replay; None for live.
    """
    ids, mask = batch.input_ids.to(device), batch.response_mask.to(device)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    routed = {} if routing is None else {"routed_experts": routing}
    attended = batch.attention_mask.to(device)
    scored = head.logprobs(model, labels, input_ids=ids, attention_mask=attended, use_cache=False, **routed)
    return torch.nn.functional.pad(scored[:, :-1], (1, 0))


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """A checkpoint that vLLM loads without a tokenizer (`skip_tokenizer_init`)."""
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="0 leaves its weights random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    started = time.perf_counter()
    model, loss = train(options.family, options.steps, options.seed, options.device)
    save(model, options.folder)
    line = {
        "family": options.family,
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "steps": options.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "held_out_nats": round(loss, 4),
    }
    print(json.dumps(line | machine(torch.device(options.device))), flush=True)


if __name__ == "__main__":
    main()
