"""Replay in every MoE family of the installed transformers, each as a whole tiny model with random weights.

`--support-table` writes what passed into docs/reference/models.md.
"""

import pytest
import torch
from zoo import CASES, NOT_REENTRANT, listed

import r3
from r3.replay import families, topk

BATCH, LENGTH = 2, 10
REPLAYED = [name for name, case in CASES.items() if case.refused is None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

every_model = pytest.mark.parametrize("name", REPLAYED)


@pytest.fixture(autouse=True)
def reproducible(device):
    """One thread, as these models are so small that threads only wait for each other; no atomics on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(device != "cpu", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def build(case, device: str, dtype: torch.dtype = torch.float32, experts: str = "eager"):
    return case.build(dtype, experts).to(device)


def inputs_of(case, device: str, seed: int = 0) -> dict:
    inputs = case.inputs(BATCH, LENGTH, seed=seed)
    return {n: value.to(device) if isinstance(value, torch.Tensor) else value for n, value in inputs.items()}


def foreign_ids(case, seed: int = 0) -> torch.Tensor:
    """int64 `[B, S, L, K]`, distinct within a row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BATCH, LENGTH, len(case.router_layers), case.num_experts, generator=generator).argsort(-1)
    return order[..., : case.top_k]


def dense(case, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights `[T, E]` whatever the order of the slots; an expert that is not among `ids` has NaN."""
    rows = torch.full((len(ids), case.num_experts), torch.nan, dtype=torch.float64, device=ids.device)
    return rows.scatter(-1, ids, weights.double())


@pytest.mark.parametrize(
    ("name", "dtype"),
    # transformers itself cannot run the others
    [(name, key) for name in REPLAYED for key, dtype in DTYPES.items() if dtype in CASES[name].dtypes],
)
def test_own_routing_is_bit_identical_to_live(name, dtype, device):
    case = CASES[name]
    for experts in case.experts:
        model, inputs = build(case, device, DTYPES[dtype], experts), inputs_of(case, device)
        with r3.record(model) as recorder:
            live = model(**inputs).logits
        replay = r3.attach(model)
        assert torch.equal(model(**inputs, routed_experts=recorder.routing).logits, live), experts
        assert replay.last.rows_replayed == BATCH * LENGTH
        assert replay.last.routers == len(case.router_layers)


@every_model
def test_foreign_ids_reach_the_experts_with_weights_and_gate_gradients_of_the_formula(name, device):
    case = CASES[name]
    model, inputs, ids = build(case, device), inputs_of(case, device), foreign_ids(case)
    replay = r3.attach(model)
    assert replay.spec.layer_ids == case.router_layers
    assert (replay.spec.num_layers, replay.spec.num_experts) == (case.num_layers, case.num_experts)
    with case.observe(model) as seen:
        model(**inputs, routed_experts=ids)
    for column, (layer, router) in enumerate(case.routers(model)):
        given, at_experts = ids[:, :, column].flatten(0, 1).to(device), seen[layer]
        formula = case.weights(model, layer, at_experts, given)
        found, expected = dense(case, at_experts.ids, at_experts.weights), dense(case, given, formula)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)

        # A random direction, because weights that are renormalised have a constant sum.
        generator = torch.Generator().manual_seed(layer)
        direction = torch.randn(found.shape, dtype=torch.float64, generator=generator).to(device)
        parameters = [p for p in router.parameters() if p.requires_grad]

        def gradients(weights, parameters=parameters, direction=direction):
            value = (weights.nan_to_num(0.0) * direction).sum()
            return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)

        pairs = list(zip(gradients(found), gradients(expected), strict=True))
        for gradient, reference in pairs:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
        assert any(bool((gradient != 0).any()) for gradient, _ in pairs)


def backward(losses) -> None:
    torch.stack([loss.float() for loss in losses]).sum().backward()


@pytest.mark.parametrize("name", [name for name in REPLAYED if CASES[name].model_class.supports_gradient_checkpointing])
def test_both_modes_of_checkpointing_give_the_gradients_of_none_over_interleaved_micro_batches(name, device):
    case = CASES[name]
    model = build(case, device)
    r3.attach(model)
    batches = [(inputs_of(case, device, seed=i), foreign_ids(case, seed=i)) for i in range(2)]

    def loss(inputs, ids):
        return model(**inputs, routed_experts=ids).logits.float().square().mean()

    without_dropout(model.train())
    backward([loss(*batch) for batch in batches])
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.enable_input_require_grads()
    for reentrant in (False,) if listed(NOT_REENTRANT, name) else (False, True):
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        losses = [loss(*batches[0])]
        model(**batches[0][0])  # live, in between
        losses.append(loss(*batches[1]))
        model(**batches[0][0], routed_experts=foreign_ids(case, seed=9))
        backward(losses)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for n, gradient in expected.items():
            tolerance = dict(rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
            torch.testing.assert_close(found[n], gradient, **tolerance, msg=f"{n}, reentrant={reentrant}")


def without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@every_model
def test_invalid_rows_are_routed_live_in_the_same_batch(name, device):
    """A sample without valid rows, and a sample whose first positions are not valid, beside replayed rows."""
    case = CASES[name]
    model, inputs, ids = build(case, device), inputs_of(case, device), foreign_ids(case)
    replay = r3.attach(model)
    live, replayed = (model(**inputs, **more).logits for more in ({}, {"routed_experts": ids}))
    start = 4
    holes = ids.clone()
    holes[0, :start] = -1
    holes[1] = -1
    with case.observe(model) as seen:
        mixed = model(**inputs, routed_experts=holes).logits
    assert (replay.last.rows_replayed, replay.last.rows_live) == (LENGTH - start, LENGTH + start)
    for column, layer in enumerate(case.router_layers):
        found = seen[layer].ids.view(BATCH, LENGTH, -1).sort().values.cpu()
        assert torch.equal(found[0, start:], ids[0, start:, column].sort().values)
    # What a sample is, and what a prefix is, another sample or later positions do not change.
    torch.testing.assert_close(mixed[1], live[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0, :start], live[0, :start], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0, start:], live[0, start:], rtol=1e-3, atol=1e-3)
    holes = ids.clone()
    holes[1] = -1
    half = model(**inputs, routed_experts=holes).logits
    torch.testing.assert_close(half[0], replayed[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half[1], live[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in REPLAYED])
def test_a_family_that_ids_do_not_determine_is_refused_by_name(name):
    model = CASES[name].build()
    with pytest.raises(r3.UnsupportedModelError, match="cannot be replayed by expert ids") as caught:
        r3.attach(model)
    assert type(model).__name__ in str(caught.value)
    with pytest.raises(r3.UnsupportedModelError), r3.record(model):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek_v4-hash", "could not be run on its own"),
        ("ernie4_5_vl_moe", "expected one router a decoder layer"),
        ("jetmoe", "no router"),
        ("llama4", "expected one top-k"),
        ("zaya", "does not return the ids"),
    ],
)
def test_the_family_files_are_needed(name, message, monkeypatch):
    model = CASES[name].build()
    r3.attach(model).detach()
    monkeypatch.setattr(families, "_FAMILIES", {})
    with pytest.raises(r3.UnsupportedModelError, match=message):
        r3.attach(model)


def test_a_router_that_fails_by_itself_is_refused_by_name():
    """So did DeepSeek V2 with group limits before transformers 5.13."""
    model = CASES["mixtral"].build()
    del model.model.layers[0].mlp.gate.top_k
    with pytest.raises(
        r3.UnsupportedModelError, match=r"(?s)layers\.0\.mlp\.gate .*could not be run on its own.*'top_k'"
    ):
        r3.attach(model)


def test_layers_that_choose_by_token_id_have_no_column_and_are_said():
    spec = r3.attach(CASES["deepseek_v4-hash"].build()).spec
    assert spec.table_layers
    assert not set(spec.table_layers) & set(spec.layer_ids)
    assert not r3.attach(CASES["deepseek_v3"].build()).spec.table_layers


def test_group_limited_weights_come_from_the_scores_before_the_mask(monkeypatch):
    model = CASES["deepseek_v2-group_limited"].build()
    monkeypatch.setattr(topk, "_MASKED_FILL", frozenset())
    with pytest.raises(r3.UnsupportedModelError, match="cut to the live top-k"):
        r3.attach(model)


def test_a_router_that_sees_some_of_the_tokens_only_is_an_error():
    """ERNIE 4.5 VL sends vision tokens to experts of their own."""
    case = CASES["ernie4_5_vl_moe"]
    model, inputs = case.build(), case.inputs(BATCH, LENGTH)
    r3.attach(model)
    vision = torch.zeros(BATCH, LENGTH, dtype=torch.int)
    vision[0, :3] = 1
    with pytest.raises(r3.ReplayError, match=r"text_moe\.gate: expected to choose for 20 tokens, got 17"):
        model(**inputs, moe_mm_token_type_ids=vision, routed_experts=foreign_ids(case))
