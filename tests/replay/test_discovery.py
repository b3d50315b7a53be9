"""Where routers are found in a module tree, and which trees are refused."""

import copy

import pytest
from models import LAYERS, tiny_moe
from torch import nn
from zoo import CASES

import r3
from r3.replay.discovery import find_routers


def refusal(model) -> str:
    with pytest.raises(r3.UnsupportedModelError) as caught:
        find_routers(model)
    return str(caught.value)


def test_the_routers_of_a_model_and_of_what_is_around_it():
    model = tiny_moe()
    for path, whole in (("", model), ("0.", nn.Sequential(model))):
        found = find_routers(whole)
        assert [site.name for site in found.sites] == [f"{path}model.layers.{i}.mlp.gate" for i in range(LAYERS)]
        assert [site.layer_id for site in found.sites] == list(range(LAYERS))
        assert [site.layer for site in found.sites] == list(found.layers) == list(model.model.layers)
        assert found.table_layers == ()


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential], ids=["bare", "wrapped"])
def test_routers_of_a_tower_are_not_those_of_the_decoder(around):
    model = tiny_moe()
    model.tower = nn.ModuleList(copy.deepcopy(model.model.layers[0]) for _ in range(5))
    found = find_routers(around(model))
    assert list(found.layers) == list(model.model.layers)
    assert len(found.sites) == LAYERS


def test_several_lists_of_layers_are_refused_with_the_first_router_of_each():
    model = tiny_moe()
    model.model.more = nn.ModuleList([model.model.layers[1]])
    model.model.layers = nn.ModuleList([copy.deepcopy(model.model.layers[0]) for _ in range(2)])
    message = refusal(model)
    assert message.startswith(
        "expected all routers in one list of decoder layers, found them in several; attach to the"
    )
    shown = {line.strip() for line in message.splitlines()[1:]}
    assert shown == {"model.layers.0.mlp.gate: 2 routers", "model.more.0.mlp.gate: 1 routers"}
    # Without a transformers model nothing says which list is the decoder's.
    plain = nn.ModuleDict({"a": copy.deepcopy(model.model.layers), "b": copy.deepcopy(model.model.more)})
    assert "found them in several" in refusal(plain)
    three = nn.ModuleDict({name: copy.deepcopy(model.model.more) for name in "abc"})
    assert refusal(three).count("1 routers") == 3


def test_gates_without_experts_beside_them_are_no_routers():
    model = tiny_moe()
    for layer in model.model.layers:
        layer.self_attn.gate = nn.Linear(32, 4)
        layer.router = nn.Linear(32, 4)
    assert [site.name for site in find_routers(model).sites] == [f"model.layers.{i}.mlp.gate" for i in range(LAYERS)]


def test_a_router_outside_of_any_list_is_refused_by_its_path():
    layer = tiny_moe().model.layers[0]
    assert refusal(layer) == "router mlp.gate is not inside a list of decoder layers"
    assert refusal(layer.mlp) == "router gate is not inside a list of decoder layers"


def test_two_routers_in_one_layer_are_refused_by_name():
    model = tiny_moe()
    model.model.layers[1].second = copy.deepcopy(model.model.layers[1].mlp)
    message = refusal(model)
    assert "expected one router a decoder layer" in message
    assert "layer 1: model.layers.1.mlp.gate and model.layers.1.second.gate" in message


def test_a_family_that_is_refused_says_where_and_why():
    first, *lines = refusal(CASES["doge"].build()).splitlines()
    assert first.startswith("DogeForCausalLM cannot be replayed by expert ids")
    why = "experts are products of two keys, chosen by two top-k"
    assert lines == [f"  model.layers.{i}.mlp (DogeCDMoE): {why}" for i in range(2)]


def test_layers_that_choose_by_token_id_are_listed():
    found = find_routers(CASES["deepseek_v4-hash"].build())
    routed = {site.layer_id for site in found.sites}
    assert set(found.table_layers) == set(range(len(found.layers))) - routed
    assert list(found.table_layers) == sorted(found.table_layers)
