"""Weights of models with vision: the published layout, the text part alone, and what may be left out."""

import copy
from pathlib import Path

import pytest
import torch
from plan_toys import raw
from ranks import Ranks
from safetensors.torch import save_file
from test_named_weights import assert_same, saved, sent
from vision_models import FAMILIES, build, importable, turned
from vllm_models import config_of, declared, vllm_model
from zoo.families import CASES

from r3.weight_sync.worker.kept_layers import kept_layers
from r3.weight_sync.worker.reload import LayerwiseReload

# Whose text part is in one model alone.
TEXT_PARTS = ["qwen3_vl_moe", "glm4v_moe", "glm5_next", "step3p7", "deepseek_ocr2"]


@pytest.mark.parametrize("intermediate", [16, 24], ids=["square", "oblong"])
def test_experts_lie_as_they_are_published_however_the_model_was_made(intermediate, tmp_path):
    """transformers tells the two layouts apart by their shape, which for a square one it cannot."""
    model = build("qwen3_vl_moe", torch.bfloat16, moe_intermediate_size=intermediate)
    theirs = saved(model, tmp_path)
    published = turned(theirs)
    assert_same(sent(model), published)
    assert_same(sent(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)), published)
    if intermediate == 24:
        save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert_same(sent(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)), published)


@pytest.mark.parametrize("name", TEXT_PARTS)
def test_the_text_part_has_the_names_of_the_whole(name):
    model = CASES[name].build(torch.bfloat16)
    whole, part = sent(model), sent(model.model.language_model)
    assert part
    assert_same(part, {n: t for n, t in whole.items() if n in part})


def test_the_text_part_of_several_models_has_its_own_names():
    """Qwen3.5-MoE's is in a model with vision and in one without, whose checkpoints know it by other names."""
    model = CASES["qwen3_5_moe"].build(torch.bfloat16)
    assert "embed_tokens.weight" in sent(model.model.language_model)


# --- vLLM's own models, on the CPU

_VISION = {"llama4": ["vision_model", "multi_modal_projector"]}
_TEXT = {"qwen3_vl_moe", "glm4v_moe"}


@pytest.fixture(scope="module")
def process():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def _vllm_takes(name: str, folder: str) -> None:
    """vLLM's model takes the whole, and without its vision tower lacks exactly what `frozen` says."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = build(name, torch.bfloat16)
    saved(model, Path(folder))
    with importable(), raw():
        config = config_of(folder)
        engine, load = vllm_model(copy.deepcopy(config))
    whole = sent(model)
    record_metadata_for_reloading(engine)  # as vLLM's loader does
    load(list(whole.items()))
    assert not any(tensor.isnan().any() for tensor in declared(engine).values())
    vision = _VISION.get(name, ["model.visual"])
    parts = {"whole": (whole, []), "frozen": (_without(whole, vision), vision)}
    if name in _TEXT:
        parts["text"] = (sent(model.model.language_model), [*vision, "lm_head"])
    for weights, frozen in parts.values():
        kept = kept_layers(engine, frozen, weights)
        assert all(kept.values()) or not frozen, kept
        layers = sorted({layer for found in kept.values() for layer in found})
        assert _lacks(engine, config, weights, []) == layers
        assert _lacks(engine, config, weights, layers) == []
    with pytest.raises(ValueError, match="and yet sent"):
        kept_layers(engine, vision, whole)


def _without(weights: dict, paths: list[str]) -> dict:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(f"{p}." for p in paths))}


def _lacks(engine, config, weights, kept) -> list[str]:
    reload = LayerwiseReload(engine, config, None, kept)
    with raw():
        reload.begin({name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights.items()})
        reload.load(weights.items())
        missing = sorted(text.split()[0] for text in reload.missing())
        reload.abandon()
    return missing


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_takes_it_whole_and_in_part(process, name, tmp_path):
    process.all(_vllm_takes, name, str(tmp_path), timeout_s=240)
