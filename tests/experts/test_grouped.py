"""r3's experts function: values and gradients against transformers' loop over the experts in float64."""

import pytest
import torch
from expert_layers import SHAPES, error, errors, inputs_of, layer_of, outcome
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import r3.experts
from r3.experts import grouped

USUAL = SHAPES["usual"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_float32(shape):
    expected = outcome(layer_of(shape, torch.float64), "eager", *inputs_of(shape, torch.float64))
    found = outcome(layer_of(shape, torch.float32), r3.experts.NAME, *inputs_of(shape, torch.float32))
    assert max(errors(found, expected).values()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_bfloat16_err_no_more_than_transformers_own(shape):
    expected = outcome(layer_of(shape, torch.float64), "eager", *inputs_of(shape, torch.float64))
    layer, inputs = layer_of(shape, torch.bfloat16), inputs_of(shape, torch.bfloat16)
    own = errors(outcome(layer, "batched_mm", *inputs), expected)
    found = errors(outcome(layer, r3.experts.NAME, *inputs), expected)
    for name, value in found.items():
        assert value < min(1.1 * own[name] + 1e-3, 2e-2), name


def test_gradients_are_those_of_the_values():
    shape = SHAPES["odd sizes"]
    layer = layer_of(shape, torch.float64)
    layer.config._experts_implementation = r3.experts.NAME
    hidden, ids, weights, _ = inputs_of(shape, torch.float64)

    def run(hidden, weights, gate_up, down):
        return torch.func.functional_call(layer, {"gate_up_proj": gate_up, "down_proj": down}, (hidden, ids, weights))

    inputs = [t.detach().requires_grad_() for t in (hidden, weights, layer.gate_up_proj, layer.down_proj)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_experts_without_tokens_have_gradients_of_zero():
    hidden, ids, weights, grad = inputs_of(USUAL, torch.float32)
    found = outcome(layer_of(USUAL, torch.float32), r3.experts.NAME, hidden, ids % 3, weights, grad)
    for name in ("gate_up_proj", "down_proj"):
        assert not found[name][3:].any()
        assert found[name][:3].flatten(1).any(1).all()


@pytest.mark.parametrize("others", [slice(4, 6), slice(None)], ids=["some", "all"])
def test_ids_beyond_the_experts_add_nothing(others):
    """Expert parallelism in transformers marks experts of other ranks with such ids, and gives them no weight."""
    hidden, ids, weights, grad = inputs_of(USUAL, torch.float64)
    weights[others] = 0
    layer = layer_of(USUAL, torch.float64)
    expected = outcome(layer, "eager", hidden, ids, weights, grad)
    ids[others] = USUAL.experts
    found = outcome(layer, r3.experts.NAME, hidden, ids, weights + (ids == USUAL.experts), grad)
    assert not found["weights"][others].any()
    expected["weights"][others] = 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_inputs_of_any_strides_and_dtypes():
    hidden, ids, weights, grad = inputs_of(USUAL, torch.float32)
    layer = layer_of(USUAL, torch.float32)
    expected = outcome(layer, r3.experts.NAME, hidden, ids, weights, grad)
    strided = hidden.t().contiguous().t(), ids.int().t().contiguous().t(), weights.t().contiguous().t()
    found = outcome(layer, r3.experts.NAME, *strided, grad[:1].expand_as(grad).clone().t().contiguous().t())
    again = outcome(layer, r3.experts.NAME, hidden, ids, weights, grad[:1].expand_as(grad))
    assert torch.equal(found["result"], expected["result"])
    assert all(torch.equal(found[name], again[name]) for name in again)
    # Routers may keep weights in float32, norms under autocast hidden states.
    low = layer_of(USUAL, torch.bfloat16)
    mixed = outcome(low, r3.experts.NAME, hidden, ids, weights, grad)
    assert {name: t.dtype for name, t in mixed.items()} == {
        "result": torch.float32,
        "hidden": torch.float32,
        "weights": torch.float32,
        "gate_up_proj": torch.bfloat16,
        "down_proj": torch.bfloat16,
    }
    assert max(error(mixed[name], expected[name].double()) for name in expected) < 2e-2


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_frozen_weights_get_no_gradient_and_change_no_other(frozen):
    inputs = inputs_of(USUAL, torch.float32)
    expected = outcome(layer_of(USUAL, torch.float32), r3.experts.NAME, *inputs)
    layer = layer_of(USUAL, torch.float32)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    found = outcome(layer, r3.experts.NAME, *inputs)
    assert found.keys() == expected.keys() - set(frozen)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_adapters_on_expert_weights_train():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, weight):
            return weight * self.scale

    layer, inputs = layer_of(USUAL, torch.float64), inputs_of(USUAL, torch.float64)
    register_parametrization(layer, "down_proj", Scaled())
    expected = outcome(layer, "eager", *inputs)
    found = outcome(layer, r3.experts.NAME, *inputs)
    assert any("scale" in name for name in found)
    assert max(errors(found, expected).values()) < 1e-12


def test_checkpointing_gives_the_same_bits_without_a_second_down_product(monkeypatch):
    calls = []
    real = grouped.grouped
    monkeypatch.setattr(grouped, "grouped", lambda *args: calls.append(args[0].shape[1]) or real(*args))
    hidden, ids, weights, grad = inputs_of(USUAL, torch.float32)
    layer = layer_of(USUAL, torch.float32)
    expected = outcome(layer, r3.experts.NAME, hidden, ids, weights, grad)
    up, down, back_down, back_up = calls
    calls.clear()
    layer.zero_grad()
    hidden.requires_grad_()
    weights.requires_grad_()
    # A residual around it, as in a decoder layer.
    result = checkpoint(lambda h: h + layer(h, ids, weights), hidden, use_reentrant=False)
    assert calls == [up, down]
    result.backward(grad)
    assert calls == [up, down, up, back_down, back_up]
    assert torch.equal(layer.down_proj.grad, expected["down_proj"])
    assert torch.equal(layer.gate_up_proj.grad, expected["gate_up_proj"])
    assert torch.equal(weights.grad, expected["weights"])
    assert torch.equal(hidden.grad, expected["hidden"] + grad)


def test_a_compiled_layer_breaks_its_graph_and_gives_the_same():
    torch._dynamo.reset()
    inputs = inputs_of(USUAL, torch.float32)
    layer = layer_of(USUAL, torch.float32)
    expected = outcome(layer, r3.experts.NAME, *inputs)
    layer.compile(backend="eager")
    found = outcome(layer, r3.experts.NAME, *inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_second_derivatives_are_refused():
    hidden, ids, weights, _ = inputs_of(USUAL, torch.float32)
    layer = layer_of(USUAL, torch.float32)
    layer.config._experts_implementation = r3.experts.NAME
    hidden.requires_grad_()
    (first,) = torch.autograd.grad(layer(hidden, ids, weights).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
