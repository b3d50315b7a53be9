"""The weights that are sent: names, shapes and bits, whatever wraps the model."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from models import tiny_moe, tokens
from peft import LoraConfig, get_peft_model
from ranks import Ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.utils import logging as transformers_logging
from vision_models import turned
from vllm_models import FAMILIES, config_of, declared, vllm_model
from zoo.families import CASES

from r3.errors import SyncError
from r3.weight_sync.weights.lazy import is_sharded
from r3.weight_sync.weights.named import adapter_weights, gathered, named_weights

transformers_logging.disable_progress_bar()


def sent(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    named = named_weights(model, **options)
    made = {name: gathered(source) for name, source in named}
    assert len(made) == len(named), "a name occurs twice"
    for name, source in named:
        assert (source.shape, source.dtype) == (made[name].shape, made[name].dtype), name
        assert made[name].is_contiguous(), name
        if source.live:
            assert made[name].untyped_storage().data_ptr() in memory_of(model), name
    return made


def memory_of(model: nn.Module) -> set[int]:
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_sharded(tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


def saved(model: nn.Module, folder) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes."""
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_save_pretrained_writes_it(case, tmp_path):
    model = case.build(case.dtypes[-1])
    expected = saved(model, tmp_path)
    assert_same(sent(model), turned(expected) if case.name == "qwen3_vl_moe" else expected)


def test_loaded_model(tmp_path):
    """A model that comes from a checkpoint remembers how it was converted."""
    model = tiny_moe()
    expected = saved(model, tmp_path)
    assert_same(sent(type(model).from_pretrained(tmp_path)), expected)


def test_experts_are_views():
    model = tiny_moe()
    experts = model.model.layers[0].mlp.experts
    for name, source in named_weights(model):
        if name.startswith("model.layers.0.mlp.experts"):
            fused = experts.down_proj if "down" in name else experts.gate_up_proj
            assert gathered(source).untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_fused_experts():
    model = tiny_moe()
    assert_same(sent(model, fused_experts=True), {n: t.detach() for n, t in model.state_dict().items()})


@pytest.mark.parametrize("name", ["mixtral", "deepseek_ocr2", "gpt_oss"])
def test_fused_experts_of_another_name(name):
    """vLLM knows these by the names of the checkpoint only."""
    model = CASES[name].build()
    assert_same(sent(model, fused_experts=True), sent(model))


def test_fused_experts_say_their_parts():
    model = tiny_moe(num_experts=12)
    apart = sent(model)
    for _, source in named_weights(model, fused_experts=True):
        if source.parts:
            whole = gathered(source)
            matrices = whole.reshape(len(source.parts), -1, whole.shape[-1])
            assert all(torch.equal(apart[part], matrix) for part, matrix in zip(source.parts, matrices, strict=True))


def test_tied(tmp_path):
    model = tiny_moe(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    got = sent(model)
    assert "lm_head.weight" not in got
    assert torch.equal(got["model.embed_tokens.weight"], model.lm_head.weight)
    assert_same(got, saved(model, tmp_path))


def test_tied_the_other_way_round():
    """The name of the checkpoint is sent, not the one that comes first in the model."""
    model = tiny_moe(tie_word_embeddings=True)
    expected = sent(model)
    head = model._modules.pop("lm_head")
    model._modules = {"lm_head": head, **model._modules}
    assert_same(sent(model), expected)


def test_tied_in_the_engine_only():
    model = tiny_moe(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(SyncError, match="two in this model"):
        named_weights(model)


def test_tied_in_the_trainer_only():
    model = tiny_moe(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(SyncError, match="does not say that they are tied"):
        named_weights(model)


def test_buffers():
    model = CASES["deepseek_v3"].build(torch.bfloat16)
    named = dict(named_weights(model))
    biases = {name for name in named if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    kept = {name for name, source in named.items() if source.keep_dtype}
    # transformers 5.24 keeps the gates in float32, too.
    assert kept - biases == {name for name, source in named.items() if source.dtype == torch.float32} - biases
    assert all(named[name].dtype == torch.float32 for name in biases)
    assert biases <= kept
    assert not any("inv_freq" in name for name in named)


def test_partial_shapes_are_refused():
    model = tiny_moe()
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(model.model.layers[1].mlp.experts.down_proj[:4])
    with pytest.raises(SyncError, match=r"layers\.1.*expected \(8, 32, 16\), got \(4, 32, 16\)"):
        named_weights(model)


def test_not_a_transformers_model():
    with pytest.raises(SyncError, match=r"expected a transformers model.*got Linear"):
        named_weights(nn.Linear(2, 2))


# --- wrappers


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen3_vl_moe"])
def test_wrapped(name):
    case = CASES[name]
    model = case.build()
    layers = model.model.language_model.layers if name == "qwen3_vl_moe" else model.model.layers
    expected = sent(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(checkpoint_wrapper(layer))
    assert_same(sent(torch.compile(model)), expected)


def test_list_can_be_sent_again():
    """After a pass that stopped anywhere, nothing of it is left in the next."""
    model = with_lora(tiny_moe(), **ADAPTERS["experts"])
    named = named_weights(model)
    for stop in range(1, len(named), 3):
        for _, source in named[:stop]:
            gathered(source)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.5
        assert_same({name: gathered(source) for name, source in named}, sent(model))


def test_changed_model_is_refused():
    model = tiny_moe()
    named = named_weights(model)
    model.to(torch.bfloat16)
    with pytest.raises(SyncError, match=r"expected .*float32 as listed, got .*bfloat16"):
        [gathered(source) for _, source in named]


# --- PEFT


def with_lora(model: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(
        **dict(r=4, lora_alpha=7, init_lora_weights=False, target_modules=["q_proj", "o_proj"]) | settings
    )
    return get_peft_model(model, config)


ADAPTERS = {
    "linear": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "bias": dict(lora_bias=True),
    "experts": dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "head": dict(target_modules=["v_proj", "lm_head", "embed_tokens"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "input_layernorm"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_merged_as_merge_and_unload(settings, dtype):
    model = tiny_moe(dtype, attention_bias=settings.get("lora_bias", False))
    bare = sent(model)
    bare = {name: tensor.clone() for name, tensor in bare.items()}
    model = with_lora(model, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = sent(model)
    assert_same(dict(model.state_dict()), before)  # the live model is not touched
    expected = sent(copy.deepcopy(model).merge_and_unload())
    assert_same(got, expected)
    assert sum(not torch.equal(got[name], bare[name]) for name in bare) >= 3, "nothing was merged"


def test_several_adapters_and_none():
    model = with_lora(tiny_moe())
    bare = {name: tensor.clone() for name, tensor in sent(copy.deepcopy(model).unload()).items()}
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert_same(sent(model), sent(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])))
    model.merge_adapter(["default", "second"])
    live = model.model.model.layers[0].self_attn.v_proj.base_layer.weight
    assert not torch.equal(live, bare["model.layers.0.self_attn.v_proj.weight"])
    assert torch.equal(sent(model)["model.layers.0.self_attn.v_proj.weight"], live)  # not merged a second time


def test_lora_of_one_of_two_tied_weights():
    model = with_lora(tiny_moe(tie_word_embeddings=True), target_modules=["lm_head"])
    with pytest.raises(SyncError, match="two in this model"):
        named_weights(model)


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(SyncError, match="trains a prompt"):
        named_weights(get_peft_model(tiny_moe(), config))


def test_adapter_alone(tmp_path):
    model = with_lora(tiny_moe())
    found = adapter_weights(torch.compile(model))
    model.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert_same({name: gathered(source) for name, source in found.weights}, expected)
    folder = found.save(tmp_path / "ours")
    assert_same(load_file(folder / "adapter_model.safetensors"), expected)
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    ours = json.loads((folder / "adapter_config.json").read_text())
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
        del config["auto_mapping"]  # where PEFT finds the class of the model
    assert ours == theirs
    again = peft.PeftModel.from_pretrained(tiny_moe(), folder)
    assert_same(sent(again), sent(model))
    with pytest.raises(SyncError, match=r"expected one of \['default'\], got 'other'"):
        adapter_weights(model, adapter="other")
    with pytest.raises(SyncError, match="expected a PeftModel"):
        adapter_weights(tiny_moe())


# --- FSDP2


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def sharded(model: nn.Module, layers) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
        fully_shard(layers[index], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def _sharded_is_whole(name: str) -> None:
    model = CASES[name].build()
    expected = {name: tensor.clone() for name, tensor in sent(model).items()}
    layers = model.model.language_model.layers if name == "qwen3_vl_moe" else model.model.layers
    model = sharded(model, layers)
    assert_same(sent(model), expected)
    assert not any(source.live for n, source in named_weights(model) if not n.endswith("e_score_correction_bias"))
    # After a forward the root's weights are gathered, and bfloat16: the true ones are sent all the same.
    ids = torch.arange(6)[None]
    named = named_weights(model)
    model(input_ids=ids, use_cache=False)
    assert_same({name: gathered(source) for name, source in named}, expected)
    model(input_ids=ids, use_cache=False)
    assert_same(sent(model), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_vl_moe"])
def test_sharded(two_ranks, name):
    two_ranks.all(_sharded_is_whole, name)


def _gates_are_sent_as_they_train(name: str, plain: bool) -> list[bool]:
    """For each weight of a router, whether it stays float32: in the forward, and hence in what is sent."""
    from r3.parallel import make_mesh, shard_parameters

    case = CASES[name]
    model = case.build()
    if plain:
        sharded(model, model.model.layers)
    else:
        shard_parameters(model, make_mesh("cpu"), param_dtype=torch.bfloat16)
    used: dict[str, torch.Tensor] = {}
    for layer, router in case.routers(model):
        path = case.router.format(layer)

        def note(module: nn.Module, args: tuple, path: str = path) -> None:
            used.update({f"{path}.{own}": p.detach().clone() for own, p in module.named_parameters(recurse=False)})

        router.register_forward_pre_hook(note)
    logits = model(**case.inputs()).logits
    logits.float().square().mean().backward()
    named = dict(named_weights(model))
    for path, weight in used.items():
        source = named[path]
        arrives = gathered(source).to(source.dtype if source.keep_dtype else torch.bfloat16)
        assert torch.equal(arrives.float(), weight.float()), path
        assert source.keep_dtype == (weight.dtype == torch.float32), path
    for _, router in case.routers(model):
        assert router.weight.grad.full_tensor().dtype == torch.float32
        assert router.weight.grad.full_tensor().any()
    if not plain and name != "ernie4_5_moe":  # whose rotary embeddings in float32 FSDP2 casts, too
        # As `from_pretrained(dtype=torch.bfloat16)` has it, with its float32 parts.
        with torch.no_grad():
            assert torch.equal(model(**case.inputs()).logits, case.build(torch.bfloat16)(**case.inputs()).logits)
    return [named[path].keep_dtype for path in sorted(used)]


@pytest.mark.parametrize("plain", [False, True], ids=["shard_parameters", "fully_shard"])
@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_moe", "glm4_moe", "deepseek_v3"])
def test_gates_are_sent_as_they_train(two_ranks, name, plain):
    """The engine's router is the trainer's, in float32 where transformers keeps it so and nobody has rounded it."""
    case = CASES[name]
    dtypes = {router.weight.dtype for _, router in case.routers(case.build(torch.bfloat16))}
    for kept in two_ranks.all(_gates_are_sent_as_they_train, name, plain):
        assert set(kept) == {not plain and dtypes == {torch.float32}}


def _bfloat16_layers_shard_after_their_routers(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    case = CASES[name]
    model = case.build(torch.bfloat16)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        sharded(model, model.model.layers)(**case.inputs())
    model = case.build(torch.bfloat16)
    expected = {n: tensor.clone() for n, tensor in sent(model).items()}
    for _, router in case.routers(model):
        fully_shard(router)
    model = sharded(model, model.model.layers)
    model(**case.inputs()).logits.float().square().mean().backward()
    assert_same(sent(model), expected)
    assert all(dict(named_weights(model))[case.router.format(n) + ".weight"].keep_dtype for n in case.router_layers)


def test_layers_of_two_dtypes_shard_after_their_routers(two_ranks):
    """What the documentation says of a model that is loaded in bfloat16, with routers in float32."""
    two_ranks.all(_bfloat16_layers_shard_after_their_routers, "ernie4_5_moe")


def _sharded_lora_is_whole(settings: dict) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = with_lora(tiny_moe(), **settings)
    expected = sent(copy.deepcopy(model).merge_and_unload())
    alone = {name: gathered(source).clone() for name, source in adapter_weights(model).weights}
    head = getattr(model.base_model.model.lm_head, "base_layer", None)
    if head is not None:  # inside a layer with adapters, and gathered until it is told otherwise
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(head, mp_policy=policy, reshard_after_forward=False)
    model = sharded(model, model.base_model.model.model.layers)
    assert_same(sent(model), expected)
    named = named_weights(model)
    model(input_ids=tokens(1, 6), use_cache=False)
    assert_same({name: gathered(source) for name, source in adapter_weights(model).weights}, alone)
    model(input_ids=tokens(1, 6), use_cache=False)
    assert_same({name: gathered(source) for name, source in named}, expected)


@pytest.mark.parametrize("name", ["linear", "dora", "experts", "head"])
def test_sharded_lora(two_ranks, name):
    two_ranks.all(_sharded_lora_is_whole, ADAPTERS[name])


def _sharded_tied_is_whole() -> None:
    model = tiny_moe(tie_word_embeddings=True)
    expected = {name: tensor.clone() for name, tensor in sent(model).items()}
    model = sharded(model, model.model.layers)
    assert_same(sent(model), expected)


def test_sharded_tied(two_ranks):
    two_ranks.all(_sharded_tied_is_whole)


# --- vLLM's own models, on the CPU


@pytest.fixture(scope="module")
def process():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def _vllm_loads(name: str, folder: str) -> int:
    """vLLM's model is the same from the live weights as from the saved ones. Says how many names fused experts save."""
    model = CASES[name].build(torch.bfloat16)
    for key, value in FAMILIES[name].items():
        setattr(model.config, key, value)
    checkpoint = saved(model, Path(folder))
    engine, load = vllm_model(config_of(folder))
    load(list(checkpoint.items()))
    expected = declared(engine)
    assert not any(tensor.isnan().any() for tensor in expected.values())
    counts = []
    for fused in (False, True):
        named = [(name, gathered(source)) for name, source in named_weights(model, fused_experts=fused)]
        counts.append(len(named))
        engine, load = vllm_model(config_of(folder))
        if fused and name.startswith("deepseek"):
            with pytest.raises(KeyError, match="experts"):
                load(named)
        else:
            load(named)
            assert_same(declared(engine), expected)
    for name, source in named_weights(model):
        if name.endswith("e_score_correction_bias"):
            there = [t for n, t in expected.items() if n.endswith(name.removeprefix("model."))]
            assert all(t.dtype == torch.float32 for t in there), name
            assert source.keep_dtype
    return counts[0] - counts[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_loads_it(process, name, tmp_path):
    pytest.importorskip("vllm")
    [fewer] = process.all(_vllm_loads, name, str(tmp_path), timeout_s=240)
    assert (fewer > 0) == (name not in ("mixtral", "granitemoe"))
