"""Forwards that are on modules themselves: accelerate's hooks and offload, patched and wrapped routers and layers."""

import types

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import LAYERS, TOP_K, random_ids, tiny_moe, tokens
from torch import nn
from zoo import CASES

import r3

# Routers in the layer itself or in its block, of other classes.
FAMILIES = ["deepseek_v3", "gemma4_text", "llama4", "mixtral"]


def forward(model, seed=None):
    more = {} if seed is None else {"routed_experts": random_ids(seed=seed)}
    return model(input_ids=tokens(), use_cache=False, **more).logits


@pytest.fixture(scope="module")
def expected():
    """Logits of the plain model: live, and replaying `random_ids(0)`."""
    model = tiny_moe()
    r3.attach(model)
    with torch.no_grad():
        return forward(model), forward(model, 0)


def own_attributes(model: nn.Module) -> list[dict]:
    """What is on each module itself, bound methods by what they are bound to."""

    def name(value):
        return (value.__func__, id(value.__self__)) if isinstance(value, types.MethodType) else value

    known = ("forward", "_old_forward", "_hf_hook", "_r3_own", "_r3_patch", "_r3_router")
    return [{key: name(vars(m)[key]) for key in known if key in vars(m)} | {"class": type(m)} for m in model.modules()]


@pytest.mark.parametrize(("name", "where"), [(name, "cpu") for name in FAMILIES] + [("mixtral", "disk")])
def test_offloaded_weights(name, where, tmp_path, device):
    """They are on meta until the hook of their module fetches them, to the device on which it runs."""
    case = CASES[name]
    model, inputs = case.build().to(device), case.inputs()
    logits = lambda **routing: model(**inputs, **routing).logits.to("cpu")
    inputs = {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, 10, len(case.router_layers), case.num_experts, generator=generator).argsort(-1)
    ids = order[..., : case.top_k]
    with torch.no_grad():
        replay = r3.attach(model)
        live, replayed = logits(), logits(routed_experts=ids)
        replay.detach()
        model, inputs = model.to("cpu"), case.inputs()
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device(device))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device(device))
        before = own_attributes(model)
        assert any(p.is_meta for p in model.parameters())
        with r3.record(model) as recorder:
            assert torch.equal(logits(), live)
        replay = r3.attach(model)
        assert torch.equal(logits(routed_experts=ids), replayed)
        assert replay.last.routers == len(case.router_layers)
        assert torch.equal(logits(routed_experts=recorder.routing), live)
        replay.detach()
        assert own_attributes(model) == before
        assert torch.equal(logits(), live)


class Nothing(ModelHook):
    pass


def add_hooks(model):
    for layer in model.model.layers:
        for module in (layer, layer.mlp, layer.mlp.gate):
            add_hook_to_module(module, Nothing())


def remove_hooks(model):
    remove_hook_from_module(model, recurse=True)


def wrap_forwards(model):
    def wrapped(function):
        def forward(*args, **kwargs):
            return function(*args, **kwargs)

        return forward

    for layer in model.model.layers:
        for module in (layer, layer.mlp.gate):
            module.forward = wrapped(module.forward)


def attach_and_detach_around(model, expected, *between):
    """Attach, run each of `between` and replay after it, detach."""
    live, replayed = expected
    replay = r3.attach(model)
    assert torch.equal(forward(model, 0), replayed)
    for change in between:
        change(model)
        assert torch.equal(forward(model, 0), replayed)
        assert replay.last.routers == LAYERS
        assert torch.equal(forward(model), live)
    replay.detach()
    assert torch.equal(forward(model), live)


@pytest.mark.parametrize(
    ("first", "between"),
    [
        ((), (add_hooks,)),
        ((), (add_hooks, remove_hooks)),
        ((), (wrap_forwards,)),
        ((add_hooks,), ()),
        ((add_hooks,), (remove_hooks,)),
        ((add_hooks,), (add_hooks,)),
        ((add_hooks,), (remove_hooks, add_hooks)),
        ((wrap_forwards,), ()),
        ((wrap_forwards,), (wrap_forwards,)),
        ((wrap_forwards,), (add_hooks,)),
        ((wrap_forwards,), (add_hooks, remove_hooks)),
        ((wrap_forwards, add_hooks), ()),
        ((wrap_forwards, add_hooks), (remove_hooks,)),
        ((add_hooks, wrap_forwards), ()),
    ],
    ids=lambda changes: "+".join(change.__name__ for change in changes) or "nothing",
)
def test_hooks_and_wrappers_come_and_go_around_attach_and_detach(expected, first, between):
    model, twin = tiny_moe(), tiny_moe()
    for change in first:
        change(model)
        change(twin)
    attach_and_detach_around(model, expected, *between)
    # A second time, and what is on the modules has the keys that it would have without replay.
    if between in ((), (remove_hooks,)):
        for change in between:
            change(twin)
        assert [m.keys() for m in own_attributes(model)] == [m.keys() for m in own_attributes(twin)]
    attach_and_detach_around(model, expected)
    remove_hooks(model)
    assert torch.equal(forward(model), expected[0])
    attach_and_detach_around(model, expected)


def test_what_was_on_the_modules_is_there_again_after_detach(expected):
    for first in (add_hooks, wrap_forwards):
        model = tiny_moe()
        first(model)
        before = own_attributes(model)
        attach_and_detach_around(model, expected)
        assert own_attributes(model) == before
    model = tiny_moe()
    before = own_attributes(model)
    attach_and_detach_around(model, expected, add_hooks, remove_hooks)
    # accelerate leaves the forward of a module's class on the module, for those that replay does not extend.
    mlp = [vars(layer.mlp).pop("forward") for layer in model.model.layers]
    assert len(mlp) == LAYERS
    assert own_attributes(model) == before


def test_the_proof_does_not_run_what_wraps_the_real_router(expected):
    model, runs = tiny_moe(), []
    for layer in model.model.layers:
        gate = layer.mlp.gate

        def counted(hidden, plain=gate.forward):
            runs.append(hidden)
            return plain(hidden)

        gate.forward = counted
    replay = r3.attach(model)
    assert not runs
    assert torch.equal(forward(model, 0), expected[1])
    assert len(runs) == LAYERS
    replay.detach()


def in_double(self, hidden):
    logits = hidden.double() @ self.weight.double().T
    weights, ids = torch.topk(logits.softmax(-1), TOP_K, dim=-1)
    return logits.float(), (weights / weights.sum(-1, keepdim=True)).float(), ids


def by_sorting(self, hidden):
    logits = hidden @ self.weight.T
    weights, ids = logits.softmax(-1).sort(-1, descending=True)
    return logits, weights[:, :TOP_K], ids[:, :TOP_K]


def test_a_router_patched_by_another_method_is_proved_by_that(expected):
    model = tiny_moe()
    for layer in model.model.layers:
        layer.mlp.gate.forward = types.MethodType(in_double, layer.mlp.gate)
    with r3.record(model) as recorder:
        live = forward(model)
    replay = r3.attach(model)
    found = model(input_ids=tokens(), use_cache=False, routed_experts=recorder.routing).logits
    assert torch.equal(found, live)
    torch.testing.assert_close(forward(model, 0), expected[1], rtol=1e-4, atol=1e-5)
    replay.detach()

    gate = model.model.layers[1].mlp.gate
    gate.forward = types.MethodType(by_sorting, gate)
    with pytest.raises(r3.UnsupportedModelError, match=r"layers\.1\.mlp\.gate.*saw 0"):
        r3.attach(model)
    gate.forward = lambda hidden: by_sorting(gate, hidden)
    with pytest.raises(r3.UnsupportedModelError, match=r"layers\.1\.mlp\.gate.*bind it with types\.MethodType"):
        r3.attach(model)


def test_a_block_that_chooses_in_a_method_put_on_it():
    case = CASES["dbrx"]
    model, inputs, runs = case.build(), case.inputs(), []
    for layer, _ in case.routers(model):
        block = model.get_submodule(case.router.format(layer).rpartition(".")[0])

        def counted(*args, plain=block.route_tokens_to_experts):
            runs.append(args)
            return plain(*args)

        block.route_tokens_to_experts = counted
    with r3.record(model) as recorder:
        live = model(**inputs).logits
    replay = r3.attach(model)
    runs.clear()
    assert torch.equal(model(**inputs, routed_experts=recorder.routing).logits, live)
    assert len(runs) == replay.last.routers == len(case.router_layers)
    replay.detach()
    assert not any("_r3" in key for module in model.modules() for key in vars(module))
    assert torch.equal(model(**inputs).logits, live)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_after_detach_is_refused(reentrant):
    """transformers 5.17 repeats a layer through its class: without r3's it would take the keyword, and route live."""
    model = tiny_moe().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    classes = [type(layer) for layer in model.model.layers]
    replay = r3.attach(model)
    loss = forward(model, 0).square().mean()
    replay.detach()
    with pytest.raises(r3.ReplayError, match="from which replay was detached"):
        loss.backward()
    del loss
    assert torch.equal(forward(model), forward(tiny_moe().train()))
    replay = r3.attach(model)
    forward(model, 0).square().mean().backward()
    assert replay.last.routers == LAYERS
    replay.detach()
    assert [type(layer) for layer in model.model.layers] == classes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", [add_hooks, wrap_forwards])
def test_a_layer_with_hooks_is_checkpointed_once_and_right(change, reentrant):
    def step(changed):
        model, runs = tiny_moe().train(), []
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
        if changed:
            change(model)
        r3.attach(model)
        if changed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        first = forward(model, 0).square().mean()
        forward(model)
        runs.clear()
        first.backward()
        return [p.grad for p in model.parameters()], len(runs)

    found, repeated = step(True)
    wanted, _ = step(False)
    assert repeated == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
