"""What is routed live: the rows, and the layers of a row, that are marked as missing, and no others."""

import pytest
import torch
from models import LAYERS, Choices, random_ids, tiny_moe, tokens
from zoo import CASES

import r3


def forward(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int64])
def test_the_last_expert_is_no_missing_row_in_any_dtype(dtype):
    model, ids = tiny_moe(num_experts=256, num_experts_per_tok=1, norm_topk_prob=False), tokens()
    replay = r3.attach(model)
    routing = torch.full((2, 10, LAYERS, 1), 255)
    routing[0, :4] = 3
    valid = torch.ones(2, 10, dtype=torch.bool)
    given = r3.RolloutRouting(routing, valid, replay.spec.layer_ids, 256)
    expected = forward(model, ids, routed_experts=given)
    assert torch.equal(forward(model, ids, routed_experts=routing.to(dtype)), expected)
    assert (replay.last.rows_replayed, replay.last.rows_live) == (20, 0)


def trained(model, inputs, **keyword):
    """Logits, and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, **keyword).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        tolerance = dict(rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)
        torch.testing.assert_close(found[1][name], gradient, **tolerance, msg=name)


# Softmax and sigmoid scores, weights of scores and of logits, a bias, group limits, one slot, dense layers first.
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text-top1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_lack_layers_are_routed_live_in_these_alone(name):
    case = CASES[name]
    model, inputs = case.build().train(), case.inputs(2, 10, seed=0)
    generator = torch.Generator().manual_seed(3)
    layers = len(case.router_layers)
    ids = torch.rand(2, 10, layers, case.num_experts, generator=generator).argsort(-1)[..., : case.top_k]
    missing = torch.rand(2, 10, layers, generator=generator) < 0.4
    missing[0, :2], missing[1, :2] = True, False
    holes = ids.masked_fill(missing[..., None], -1)
    with Choices(case, holes.flatten(0, 1)) as choices:
        expected = trained(model, inputs)
    assert len(choices.chosen) == layers
    assert any(bool((gradient != 0).any()) for n, gradient in expected[1].items() if "gate" in n or "router" in n)

    replay = r3.attach(model)
    routing = replay.routing(holes)
    report = r3.replay.ForwardReport(
        rows_replayed=int((~missing).all(-1).sum()),
        rows_live=int(missing.any(-1).sum()),
        pairs_replayed=int((~missing).sum()),
        pairs_live=int(missing.sum()),
        routers=layers,
    )
    with r3.record(model) as recorder:
        require_equal(trained(model, inputs, routed_experts=holes), expected)
    assert replay.last == report
    assert torch.equal(recorder.routing.expert_ids.long().flatten(0, 1), torch.stack(choices.chosen, 1))
    if not case.model_class.supports_gradient_checkpointing:
        return
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        require_equal(trained(model, inputs, routed_experts=routing), expected)


@pytest.mark.parametrize("name", ["deepseek_v2", "jetmoe", "longcat_flash", "zaya"])
def test_rows_that_lack_all_layers_are_those_that_are_not_valid(name):
    """Of families with masks, groups and routers of their own: per row and per layer are one."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(2, 10, seed=0)
    replay = r3.attach(model)
    layers = len(case.router_layers)
    ids = torch.rand(2, 10, layers, case.num_experts).argsort(-1)[..., : case.top_k]
    holes = ids.clone()
    holes[0, 2:5] = -1
    expected = model(**inputs, routed_experts=holes).logits
    by_layer = replay.routing(torch.cat([holes, ids]))
    by_layer = r3.RolloutRouting.cat([by_layer, replay.routing(ids[:1].index_fill(2, torch.tensor([0]), -1))])
    assert by_layer.validity.dim() == 3
    torch.testing.assert_close(model(**inputs, routed_experts=by_layer.select([0, 1])).logits, expected)
    assert (replay.last.rows_live, replay.last.pairs_live) == (3, 3 * layers)
    # With what was recorded of rows that lack layers, whole rows give the same.
    holes[1, :, 0] = holes[0, 7:, -1] = -1
    with r3.record(model) as recorder:
        mixed = model(**inputs, routed_experts=holes).logits
    found = recorder.routing.expert_ids.long()
    assert torch.equal(found[holes >= 0], holes[holes >= 0])
    torch.testing.assert_close(model(**inputs, routed_experts=found).logits, mixed)


def test_compiled_layers_share_one_graph_whatever_layers_rows_lack():
    layers = 10  # more than torch.compile recompiles before it gives up
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = tiny_moe(num_hidden_layers=layers), tokens()
    model.set_experts_implementation("grouped_mm")
    r3.attach(model)
    routings = []
    for seed in range(2):
        missing = torch.rand(2, 10, layers, generator=torch.Generator().manual_seed(seed)) < 0.5
        routings.append(random_ids(layers=layers, seed=seed).masked_fill(missing[..., None], -1))
    wanted = [forward(model, ids, routed_experts=routing) for routing in routings]
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for routing, logits in zip(routings, wanted, strict=True):
        found = forward(model, ids, routed_experts=routing)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
