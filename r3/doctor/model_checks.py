"""Checks of a model's folder: whether it can be replayed, its tokenizer, and its generation config."""

import json
from pathlib import Path

from r3.doctor.check import Check, brief
from r3.routing import RoutingSpec

NEUTRAL = {"temperature": {1}, "top_k": {0, -1}, "top_p": {1}, "min_p": {0}, "repetition_penalty": {1}}
"""Values of a generation config that leave the distribution as it is; so does None."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenization_*.py")


def model(path: Path, specs: list[RoutingSpec]) -> Check:
    """Check that the folder's model can be replayed, without loading weights; adds its routing spec to `specs`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r3.replay import attach

    if not (path / "config.json").is_file():
        return Check(
            name="model",
            status="problem",
            detail=f"{path} has no config.json",
            remedy="set trainer.policy.model.path (or --model) to the folder of a checkpoint",
        )
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = attach(model).spec
    specs.append(spec)
    detail = f"{type(model).__name__}: {len(spec.layer_ids)} of {spec.num_layers} decoder layers have a router, "
    return Check(name="model", status="ok", detail=f"{detail}{spec.top_k} of {spec.num_experts} experts")


def generation_config(path: Path) -> Check | None:
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    values = {name: value for name, value in json.loads(file.read_text()).items() if name in NEUTRAL}
    changing = {name: value for name, value in values.items() if value not in NEUTRAL[name] | {None}}
    if not changing:
        return Check(name="generation config", status="ok", detail="changes nothing about sampling")
    return Check(
        name="generation config",
        status="warning",
        detail=f"`vllm serve` applies {changing} to requests that do not say otherwise",
        remedy="start the server with --generation-config vllm (r3.capture.server_args does)",
    )


def tokenizer(path: Path) -> Check:
    """Check that the tokenizer loads, has padding and end tokens, and fits the model's vocabulary."""
    from transformers import AutoConfig, AutoTokenizer

    if not any(list(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        # Without these files the library makes an empty tokenizer.
        return Check(
            name="tokenizer",
            status="problem",
            detail=f"{path} has none of {', '.join(TOKENIZER_FILES)}",
            remedy="save the tokenizer beside the model: tokenizer.save_pretrained(folder)",
        )
    try:
        loaded = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a foreign folder makes the library raise
        return Check(
            name="tokenizer",
            status="problem",
            detail=f"cannot be loaded: {brief(error)}",
            remedy="save the tokenizer beside the model: tokenizer.save_pretrained(folder)",
        )
    vocabulary = int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)
    detail = (
        f"{len(loaded)} tokens of the model's {vocabulary}, end {loaded.eos_token_id}, padding {loaded.pad_token_id}"
    )
    if len(loaded) > vocabulary:
        return Check(
            name="tokenizer",
            status="problem",
            detail=f"{detail}: it has tokens that the model does not know",
            remedy="use the tokenizer of this checkpoint, or resize the model's embeddings",
        )
    lacking = [name for name in ("eos_token", "pad_token") if getattr(loaded, f"{name}_id") is None]
    if lacking:
        return Check(
            name="tokenizer",
            status="problem",
            detail=f"{detail}: no {' and no '.join(lacking)}",
            remedy="set them in tokenizer_config.json; a trainer pads, and completions end",
        )
    return Check(name="tokenizer", status="ok", detail=detail)
