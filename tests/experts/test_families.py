"""Whole models under each experts function: r3's where it fits, refusals where not, and replay under all of them."""

import logging

import pytest
import torch
import torch.distributed as dist
import transformers
from models import random_ids, tiny_dense, tiny_moe, tokens
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from zoo import CASES

import r3
from r3.experts import NAME, register, use_experts

# One for each kind of router and block: softmax, sigmoid with groups, shared experts, images, state spaces.
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen2_moe", "ernie4_5_vl_moe", "jamba"]
UNFIT = {
    "gpt_oss": "GptOssExperts: biases, transposed weights, interleaved gate and up weights, a gate of its own",
    "gemma4": "the activation GELUTanh",
    "nemotron_h": "experts without a gate",
    "muse_spark": "a norm after the experts",
    "deepseek_v4": "a gate of its own, DeepseekV4Experts._apply_gate",
}
OUTSIDE = ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "step3p7"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_what_the_loop_over_experts_gives(name):
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        expected = model(**case.inputs()).logits
        assert use_experts(model) == NAME
        found = model(**case.inputs()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "reason"), UNFIT.items())
def test_layers_that_do_not_fit_are_refused_by_name_and_auto_leaves_them(name, reason, caplog):
    case = CASES[name]
    model = case.build(experts="grouped_mm")
    with pytest.raises(r3.UnsupportedModelError, match=reason):
        use_experts(model, NAME)
    with caplog.at_level(logging.WARNING, "r3"):
        assert use_experts(model) == model.config._experts_implementation
    assert reason in caplog.text
    assert "grouped_mm" in caplog.text
    # Also where a model is loaded with it, and nobody asked r3.
    model.set_experts_implementation(NAME)
    with pytest.raises(r3.UnsupportedModelError, match="cannot compute"):
        model(**case.inputs())


@pytest.mark.parametrize("name", OUTSIDE)
def test_models_outside_the_registry_are_left_alone(name):
    model = CASES[name].build()
    assert use_experts(model) == "eager"
    assert use_experts(model, "eager") == "eager"
    for implementation in (NAME, "grouped_mm"):
        with pytest.raises(r3.UnsupportedModelError, match="reaches"):
            use_experts(model, implementation)


def test_dense_models_unknown_names_and_functions_without_a_backward():
    use_experts(tiny_dense())
    with pytest.raises(r3.UnsupportedModelError, match=r"trainer\.policy\.model\.experts_implementation=fastest"):
        use_experts(tiny_moe(), "fastest")
    with pytest.raises(r3.UnsupportedModelError, match="deepgemm: expected a function with a backward"):
        use_experts(tiny_moe(), "deepgemm")


def test_a_saved_model_does_not_name_it(tmp_path):
    model = tiny_moe()
    use_experts(model, NAME)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert (
        type(model).from_pretrained(tmp_path, experts_implementation=register()).config._experts_implementation == NAME
    )


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def loss_and_gradients(model, case, **routing):
    model.zero_grad()
    logits = model(**case.inputs(), **routing).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# tests/replay/test_every_model.py has the loop and the grouped products of transformers, for all families.
@pytest.mark.parametrize("name", FAMILIES[:5])
@pytest.mark.parametrize("implementation", ["batched_mm", NAME])
def test_replay_is_exact_under_further_experts_functions(name, implementation, one_thread):
    """One thread, since a backward of `batched_mm` adds up gradients of weights in no fixed order on several."""
    if implementation == "batched_mm" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("batched_mm of some releases before 5.17 writes over the ids that the router's backward needs")
    case = CASES[name]
    model = case.build()
    use_experts(model, implementation)
    with r3.record(model) as recorder:
        live = loss_and_gradients(model, case)
    replay = r3.attach(model)
    own = loss_and_gradients(model, case, routed_experts=recorder.routing)
    assert replay.last.rows_replayed == 20
    assert all(torch.equal(own[key], live[key]) for key in live)
    shape = (2, 10, len(replay.spec.layer_ids), case.num_experts)
    foreign = torch.rand(shape, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., : case.top_k]
    found = loss_and_gradients(model, case, routed_experts=foreign)
    use_experts(model, "eager")
    expected = loss_and_gradients(model, case, routed_experts=foreign)
    assert not torch.allclose(expected["logits"], live["logits"], rtol=1e-2)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=2e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_fsdp2_and_checkpointing(mesh, dtype):
    def gradients(shard):
        model = tiny_moe().train()
        use_experts(model, NAME)
        r3.attach(model)
        if shard:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=low)
            fully_shard(model, mesh=mesh, mp_policy=low)
        else:
            for parameter in model.parameters():  # not the buffers, which FSDP2 leaves alone
                parameter.data = parameter.data.to(dtype)
        model(
            input_ids=tokens(), routed_experts=random_ids(), use_cache=False
        ).logits.float().square().mean().backward()
        return {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)().float() for n, p in model.named_parameters()}

    found, expected = gradients(True), gradients(False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
