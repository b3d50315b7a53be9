"""Checkpointing around a part of a decoder layer: what the backward pass repeats chooses as its own forward did."""

import threading

import peft
import pytest
import torch
import torch.distributed as dist
from models import random_ids, tiny_moe, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from zoo import CASES

import r3

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
# Routers that choose in themselves, in their block, in their experts, in the layer; groups, tables, hybrids.
FAMILIES = [
    "deepseek_v2-group_limited",
    "deepseek_v3",
    "deepseek_v4-hash",
    "ernie4_5_vl_moe",
    "gemma4_text",
    "gpt_oss",
    "granitemoehybrid",
    "jetmoe",
    "llama4",
    "mixtral",
    "qwen3_next",
    "zaya",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wrap(model: nn.Module, paths: list[str], reentrant: bool) -> None:
    """The wrapper that FSDP's users know, around modules of `model`."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, checkpoint_wrapper(model.get_submodule(path), kind))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close = dict(rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, **close, msg=name)


def foreign(case, seed: int) -> torch.Tensor:
    """int64 `[2, 10, L, K]`, distinct within a row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, 10, len(case.router_layers), case.num_experts, generator=generator).argsort(-1)
    return order[..., : case.top_k]


def part_of(case, layer: int) -> str:
    """The block of a layer, or its router where the layer itself is the block."""
    router = case.router.format(layer)
    block = router.rpartition(".")[0]
    return router if block.endswith(f".{layer}") else block


@pytest.mark.parametrize("name", FAMILIES)
def test_the_block_alone_over_two_micro_batches_and_what_runs_in_between(name, device):
    case = CASES[name]
    batches = []
    for seed in range(2):
        inputs = case.inputs(seed=seed)
        inputs = {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in inputs.items()}
        batches.append((inputs, foreign(case, seed)))

    def step(model, extra: bool) -> dict[str, torch.Tensor]:
        def loss(inputs, ids):
            more = {} if ids is None else {"routed_experts": ids}
            return model(**inputs, **more).logits.float().square().mean()

        losses = [loss(*batches[0]), loss(batches[1][0], None), loss(*batches[1])]
        if extra:
            with r3.record(model):
                loss(batches[1][0], None)
            loss(batches[0][0], foreign(case, 9))
        torch.stack(losses).sum().backward()
        return gradients(model)

    def build():
        model = case.build().to(device).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    model = build()
    r3.attach(model)
    expected = step(model, extra=False)
    for reentrant in (False, True):
        model = build()
        replay = r3.attach(model)
        wrap(model, [part_of(case, layer) for layer in case.router_layers], reentrant)
        assert_same(step(model, extra=True), expected)
        replay.detach()


def loss_of(model: nn.Module, seed: int, *, live: bool = False, **kwargs) -> torch.Tensor:
    if not live:
        kwargs["routed_experts"] = random_ids(seed=seed)
    inputs = kwargs if "inputs_embeds" in kwargs else {"input_ids": tokens(seed=seed), **kwargs}
    return model(use_cache=False, **inputs).logits.square().mean()


def two_steps(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a replayed, a live and another replayed forward, in one backward pass."""
    torch.stack([loss_of(model, 0), loss_of(model, 1, live=True), loss_of(model, 2)]).sum().backward()
    return gradients(model)


@pytest.fixture(scope="module")
def expected():
    model = tiny_moe().train()
    r3.attach(model)
    return two_steps(model)


def paths(part: str) -> list[str]:
    return [f"model.layers.{layer}.{part}" for layer in range(3)]


@MODES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "parts",
    [
        ("mlp",),
        ("mlp.gate",),
        ("mlp.experts",),
        ("self_attn",),
        ("self_attn", "mlp"),
        ("post_attention_layernorm", "mlp.gate"),
    ],
)
def test_any_part_wrapped_before_or_after_attach(expected, parts, when, reentrant):
    model = tiny_moe().train()
    every = [path for part in parts for path in paths(part)]
    if when == "before":
        wrap(model, every, reentrant)
    r3.attach(model)
    if when == "after":
        wrap(model, every, reentrant)
    assert_same(two_steps(model), expected)


@MODES
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_on_the_instance_that_checkpoints(expected, when, reentrant):
    model = tiny_moe().train()

    def patch():
        for layer in model.model.layers:
            plain = layer.mlp.forward
            layer.mlp.forward = lambda hidden, plain=plain: checkpoint(plain, hidden, use_reentrant=reentrant)

    if when == "before":
        patch()
    r3.attach(model)
    if when == "after":
        patch()
    assert_same(two_steps(model), expected)


@MODES
@pytest.mark.parametrize("outer", [False, True], ids=["outer_non_reentrant", "outer_reentrant"])
def test_a_part_inside_a_layer_that_is_checkpointed_as_well(expected, outer, reentrant):
    model = tiny_moe().train()
    r3.attach(model)
    wrap(model, paths("mlp"), reentrant)
    model.gradient_checkpointing_enable({"use_reentrant": outer})
    model.enable_input_require_grads()
    assert_same(two_steps(model), expected)


@MODES
def test_the_first_layer_that_is_trained_has_an_input_without_gradient(reentrant):
    """LoRA on frozen weights: nothing leads from the first layer's block to its input."""

    def step(wrapped):
        model = peft.get_peft_model(tiny_moe().train(), peft.LoraConfig(target_modules=["q_proj"], r=4))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, generator=generator)
        r3.attach(model)
        if wrapped:
            wrap(model, [f"base_model.model.{path}" for path in paths("mlp")], reentrant)
        return two_steps(model)

    found = step(True)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in found
    assert_same(found, step(False))


@pytest.mark.parametrize("inner", [False, True], ids=["inner_non_reentrant", "inner_reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["outer_non_reentrant", "outer_reentrant"])
def test_parts_inside_parts_are_right_or_refused(expected, outer, inner):
    model = tiny_moe().train()
    r3.attach(model)
    wrap(model, paths("mlp.gate"), inner)
    wrap(model, paths("mlp"), outer)
    if not outer:
        assert_same(two_steps(model), expected)
        return
    # What a reentrant repeat builds is a graph of its own.
    with pytest.raises(r3.ReplayError, match=r"layers\.2\.mlp\.gate is repeated.*Wrap the decoder layer in place"):
        two_steps(model)


@MODES
def test_one_input_of_two_forwards(reentrant):
    """The same embeddings go into both: what comes out of one node belongs to either."""

    def step(wrapped):
        model = tiny_moe().train()
        r3.attach(model)
        if wrapped:
            wrap(model, paths("mlp"), reentrant)
        embeds = model.model.embed_tokens(tokens())
        losses = [loss_of(model, seed, inputs_embeds=embeds) for seed in (0, 1)]
        losses.append(loss_of(model, 2, live=True, inputs_embeds=embeds))
        torch.stack(losses).sum().backward()
        return gradients(model)

    assert_same(step(True), step(False))


@MODES
def test_two_threads_each_with_its_own_routing(reentrant):
    model = tiny_moe().train()
    r3.attach(model)
    wanted = []
    for seed in range(2):
        loss_of(model, seed).backward()
        wanted.append(gradients(model))
    wrap(model, paths("mlp"), reentrant)
    barrier, losses = threading.Barrier(2), {}

    def work(seed):
        barrier.wait()
        losses[seed] = loss_of(model, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # In a third thread: whose graph it is does not depend on who asks.
    for seed in (1, 0):
        losses[seed].backward()
        assert_same(gradients(model), wanted[seed])


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@MODES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("unit", ["layer", "experts", "block"])
def test_under_fsdp2(expected, mesh, unit, when, reentrant):
    if unit == "experts" and reentrant:
        pytest.skip("FSDP2 itself does not take reentrant checkpointing around a unit")
    model = tiny_moe().train()
    replay = r3.attach(model) if when == "before" else None
    wrap(model, paths("mlp"), reentrant)
    for layer in model.model.layers:
        inner = {"experts": layer.mlp.experts, "block": layer.mlp}.get(unit)
        if inner is not None:
            fully_shard(inner, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    replay = replay or r3.attach(model)
    found = {name: gradient.full_tensor() for name, gradient in two_steps(model).items()}
    assert_same(found, expected)


def compiled_and_wrapped(part: str, reentrant: bool) -> nn.Module:
    torch._dynamo.reset()
    model = tiny_moe().train()
    model.set_experts_implementation("grouped_mm")
    r3.attach(model)
    if part == "mlp":
        for layer in model.model.layers:
            layer.mlp.compile(backend="aot_eager")
    wrap(model, paths("mlp"), reentrant)
    if part == "layer":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("part", "reentrant"),
    [("layer", False), ("layer", True), ("mlp", True)],
    ids=["layer", "layer-reentrant", "mlp-reentrant"],
)
def test_compiled_layers_and_compiled_parts(expected, part, reentrant):
    found = two_steps(compiled_and_wrapped(part, reentrant))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_compiled_part_whose_repeat_has_to_save_the_same_tensors_is_refused():
    with pytest.raises(r3.ReplayError, match=r"router model\.layers\.2\.mlp\.gate.*compiled\. Wrap the decoder layer"):
        two_steps(compiled_and_wrapped("mlp", False))
