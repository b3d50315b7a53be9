"""Layers whose loading or processing is not what a plan can do stay with vLLM, to the same bits."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plan_toys import Toy, derive, halves, initial, planned_equals_slow, synced, weights_of
from torch import nn


def nothing(method, layer):
    pass


def harmless(method, layer):
    """What vLLM's unquantised methods do: no copy where none is needed, a copy onto itself, shapes."""
    layer.weight.data = layer.weight.data.contiguous()
    layer.weight.data.copy_(layer.weight.data)
    torch.empty_like(layer.weight)
    layer.shape = layer.weight.shape


@pytest.mark.parametrize("process", [None, nothing, harmless])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_plain_layers_are_planned(vllm_config, process, chunk):
    plan = planned_equals_slow(lambda: Toy(process), vllm_config, chunk=chunk)
    assert plan.slow == {}
    assert plan.describe() == {
        "layers_planned": 2,
        "layers_slow": 0,
        "slow_reasons": {},
        "sources_planned": 6,
        "sources_slow": 0,
        "sources_dropped": 0,
        "copies": 6,
        "bytes_planned": 2 * 4 * (8 * 8 + 8),
        "bytes_slow": 0,
    }


def swap_halves(method, layer):
    half = layer.weight.shape[0] // 2
    layer.weight.data = torch.cat([layer.weight[half:], layer.weight[:half]])


def swap_halves_unseen(method, layer):
    """As a kernel that does not go through PyTorch's dispatcher."""
    array = layer.weight.data.numpy()
    array[:] = np.concatenate([array[4:], array[:4]])


def transpose(method, layer):
    layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)


def transpose_view(method, layer):
    layer.weight = nn.Parameter(layer.weight.t(), requires_grad=False)


def derive_unseen(method, layer):
    layer.cache = torch.from_numpy(layer.weight.data.numpy() * 2)


def derive_in_a_kernel(method, layer):
    method.kernel = SimpleNamespace(settings=[{"scale": torch.from_numpy(layer.weight.data.numpy() * 2)}])


def derive_in_a_closure(method, layer):
    packed = torch.from_numpy(layer.weight.data.numpy() * 2)
    layer.run = lambda x: x @ packed


def keep_a_view(method, layer):
    layer.turned = layer.weight.data.t()


def keep_a_number(method, layer):
    layer.largest = float(layer.weight.abs().max())


def keep_in_a_buffer_of_its_own(method, layer):
    if not hasattr(layer, "kept"):
        layer.kept = torch.zeros_like(layer.weight)
    layer.kept.copy_(layer.weight)


def clamp(method, layer):
    layer.weight.data.clamp_(-100, 100)  # changes nothing, with these weights


def replace(method, layer):
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)


def replace_unseen(method, layer):
    layer.weight = nn.Parameter(torch.from_numpy(layer.weight.data.numpy().copy()), requires_grad=False)


def add_a_parameter(method, layer):
    if "extra" not in layer._parameters:
        layer.register_parameter("extra", nn.Parameter(torch.ones(3), requires_grad=False))


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (swap_halves, "computes with its weights .*aten::cat"),
        (swap_halves_unseen, "differ from the checkpoint's"),
        (transpose, "computes with its weights .*aten::clone"),
        (transpose_view, "changes a parameter's shape, strides"),
        (derive, "computes with its weights .*aten::sum"),
        (derive_unseen, "keeps a tensor"),
        (derive_in_a_kernel, "keeps a tensor"),
        (derive_in_a_closure, "keeps a tensor"),
        (keep_a_view, "keeps a tensor"),
        (keep_a_number, "computes with its weights .*aten::abs"),
        (keep_in_a_buffer_of_its_own, "copies its weights elsewhere"),
        (clamp, "computes with its weights .*aten::clamp_"),
        (replace, "computes with its weights .*aten::clone"),
        (replace_unseen, "replaces a parameter"),
        (add_a_parameter, "adds or removes parameters"),
    ],
)
def test_layers_that_processing_changes_stay_with_vllm(vllm_config, process, reason):
    plan = planned_equals_slow(lambda: Toy(process), vllm_config)
    assert plan.slow.keys() == {"one"}
    assert re.search(f"^Fused: .*{reason}", plan.slow["one"]), plan.slow
    assert plan.layers.keys() == {"two"}
    assert plan.describe()["sources_slow"] == 3


def doubling(param, loaded, half):
    halves(param, loaded * 2, half)


def in_place_after(param, loaded, half):
    """As vLLM's composed loaders: a copy, then arithmetic on the parameter."""
    halves(param, loaded, half)
    param.data.narrow(0, half * 4, 4).mul_(2)


def spreading(param, loaded, half):
    param.data.narrow(0, half * 4, 4).copy_(loaded[:1].expand(4, -1))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (doubling, "computed or cast on the way"),
        (in_place_after, "computes with its weights .*aten::mul_"),
        (spreading, "spread over several elements"),
    ],
)
def test_loaders_that_do_more_than_copy_stay_with_vllm(vllm_config, loader, reason):
    plan = planned_equals_slow(lambda: Toy(loader=loader), vllm_config)
    assert plan.slow.keys() == {"one"}
    assert re.search(reason, plan.slow["one"]), plan.slow


def test_a_cast_stays_with_vllm(vllm_config):
    def half_precision(seed):
        return {n: t.bfloat16() if n == "one.up" else t for n, t in weights_of(seed).items()}

    plan = planned_equals_slow(Toy, vllm_config, half_precision)
    assert "cast" in plan.slow["one"]
    assert plan.slow.keys() == {"one"}


def test_sources_that_load_weights_cuts_and_turns_are_known(vllm_config):
    class Turning(Toy):
        def load_weights(self, weights):
            turned = []
            for name, weight in weights:
                if name.endswith("both"):  # [columns, 2 * rows], as some checkpoints store experts
                    gate, up = weight.t().chunk(2)
                    turned += [(name.replace("both", "gate"), gate), (name.replace("both", "up"), up)]
                else:
                    turned.append((name, weight))
            super().load_weights(turned)

    def stored(seed):
        weights = weights_of(seed)
        both = {
            f"{la}.both": torch.cat([weights.pop(f"{la}.{p}") for p in ("gate", "up")]).t().contiguous()
            for la in ("one", "two")
        }
        return weights | both

    plan = planned_equals_slow(Turning, vllm_config, stored)
    assert plan.slow == {}
    assert len(plan.copies["one.both"]) == 1


def test_constant_weights_prove_nothing(vllm_config):
    def constant(seed):
        return {n: torch.full_like(t, 3) if n == "one.up" else t for n, t in weights_of(seed).items()}

    model = initial(Toy(swap_halves_unseen), constant(0))
    plan = synced(model, vllm_config, {n: torch.ones_like(t) for n, t in constant(0).items()}).learned
    assert plan.slow == dict.fromkeys(("one", "two"), "Fused: constant weights prove nothing")
    plan = planned_equals_slow(Toy, vllm_config, constant)
    assert plan.slow == {"one": "Fused: constant weights prove nothing"}


def test_vectors_may_be_constant(vllm_config):
    flat = lambda seed: {n: torch.ones_like(t) if "norm" in n else t for n, t in weights_of(seed).items()}
    assert planned_equals_slow(Toy, vllm_config, flat).slow == {}
