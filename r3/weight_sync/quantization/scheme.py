"""Which weights a checkpoint holds in FP8: as vLLM's `Fp8Config` decides, from the Hugging Face configuration."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r3.errors import SyncError, summary

SCALE = "_scale_inv"
_EXPERTS = re.compile(r"(.*\.experts)\.(?:\d+|gate_up_proj|down_proj)(?:\.|$)")
# Routers, and the head. vLLM builds some routers without quantisation whatever the configuration says (DeepSeek), and
# others only if they are listed (Qwen3-MoE, whose FP8 checkpoints list them all).
_NEVER = {"gate", "router", "shared_expert_gate", "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Fp8Scheme:
    """How an engine holds its weights in FP8.

    Attributes:
        block: rows and columns that share a scale.
        ignored: modules that are not quantised, by their names in the checkpoint.
        power_of_two: whether scales are powers of two (UE8M0).
        held: names of the weights that are FP8, if a checkpoint says; None to go by `ignored`.
    """

    block: tuple[int, int]
    ignored: frozenset[str] = frozenset()
    power_of_two: bool = False
    held: frozenset[str] | None = None

    def holds(self, name: str, shape: torch.Size) -> bool:
        """Whether the weight `name` is FP8 in the engine's checkpoint. Norms, routers and embeddings never are.

        Raises:
            SyncError: experts in one tensor, of which only a checkpoint can say how it holds them.
        """
        if self.held is not None:
            return name in self.held
        module, _, kind = name.rpartition(".")
        own = module.rpartition(".")[2]
        # vLLM decides for all experts of a layer at once: one that is named leaves all of them as they are.
        experts = _EXPERTS.match(name)
        if experts is not None and any(experts[1] in ignored for ignored in self.ignored):
            return False
        if experts is not None and len(shape) == 3:
            raise SyncError(f"{name}: the checkpoint's own form has all experts in one; their FP8 form is not known")
        if kind != "weight" or len(shape) != 2 or own in _NEVER or "embed" in own:
            return False
        return experts is not None or module not in self.ignored


def fp8_scheme(config: Any, checkpoint: str | Path | None = None) -> Fp8Scheme:
    """Read the quantisation of a model.

    Args:
        config: Hugging Face configuration of the engine's model, as an object or a dictionary, or its
            `quantization_config`.
        checkpoint: folder of the engine's checkpoint, of which only names are read; they then decide, and not the
            rules.

    Raises:
        SyncError: not FP8 in blocks; a folder without safetensors files, or without scales.
    """
    settings = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    settings = settings.get("quantization_config") or settings
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method != "fp8" or not block or len(block) != 2 or settings.get("fmt", "e4m3") != "e4m3":
        raise SyncError(
            "quantization_config: expected quant_method 'fp8', fmt 'e4m3' and a weight_block_size of two numbers, got "
            f"{method!r}, {settings.get('fmt')!r} and {block!r}: only FP8 in blocks can be synced into"
        )
    return Fp8Scheme(
        block=(int(block[0]), int(block[1])),
        ignored=frozenset(settings.get("ignored_layers") or settings.get("modules_to_not_convert") or ()),
        power_of_two=settings.get("scale_fmt") == "ue8m0",
        held=None if checkpoint is None else _held(Path(checkpoint)),
    )


def _held(folder: Path) -> frozenset[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"])
    else:
        from safetensors import safe_open

        names = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
    held = frozenset(name.removesuffix(SCALE) for name in names if name.endswith(SCALE))
    if not held:
        raise SyncError(
            f"{folder}: expected a checkpoint with *{SCALE} tensors, found {len(names)} names and none of them"
        )
    lost = sorted(held - names)
    if lost:
        raise SyncError(f"{folder}: scales without a weight:{summary(lost)}")
    return held
