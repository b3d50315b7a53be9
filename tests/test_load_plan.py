"""A learned load plan gives the bits that vLLM's own loaders give, or the layer stays on vLLM's path."""

import contextlib
import logging
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import nn

import r3
from r3.weight_sync.plan import Copy, Region, coalesced, coverage_problem
from r3.weight_sync.plan_record import held_tensors, own_tensors
from r3.weight_sync.reload import LayerwiseReload, join_gates

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "chain_sum_moe"
LAYERS, EXPERTS = 8, 32


# Copies and their compression.


def copies_of(loads: list[tuple[torch.Tensor, torch.Tensor]], target: torch.Tensor) -> list[Copy]:
    """The copies of views of one source to views of `target`."""
    return [
        Copy(
            layer="layer",
            tensor="tensor",
            size=tuple(to.shape),
            source_stride=one.stride(),
            target_stride=to.stride(),
            source_offset=one.storage_offset(),
            target_offset=to.storage_offset() - target.storage_offset(),
        )
        for to, one in loads
    ]


def fused_experts(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """w1 and w3 of a fused `[E, 2I, H]`, a rank's part, as vLLM loads them: an expert and a half at a time."""
    experts, inner, hidden = 6, 8, 5
    source = torch.randn(experts, 2 * inner, hidden)
    part = inner // size
    target = torch.zeros(experts, 2 * part, hidden)
    loads = [
        (target[e].narrow(0, half * part, part), source[e].chunk(2)[half].narrow(0, rank * part, part))
        for half in (0, 1)
        for e in range(experts)
    ]
    return source, target, loads


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
def test_fused_experts_become_one_copy(rank, size):
    source, target, loads = fused_experts(rank, size)
    (one,) = coalesced(copies_of(loads, target))
    assert len(one.size) == (1 if size == 1 else 2)
    for to, part in loads:
        to.copy_(part)
    again = torch.zeros_like(target)
    one.target.of(again).copy_(one.source.of(source))
    assert torch.equal(again, target)


def test_columns_of_every_expert_become_one_copy():
    source, target = torch.randn(6, 5, 8), torch.zeros(6, 5, 4)
    loads = [(target[e], source[e].narrow(1, 4, 4)) for e in range(6)]
    (one,) = coalesced(copies_of(loads, target))
    assert one.size == (30, 4)


@pytest.mark.parametrize("seed", range(40))
def test_any_set_of_copies_does_the_same_when_coalesced(seed):
    """Random cuts of a random source, loaded in random order, whole or transposed, with and without gaps."""
    choose = random.Random(seed)
    shape = [choose.randint(1, 5) for _ in range(3)]
    source = torch.randn(shape)
    target = torch.zeros(choose.choice([shape, shape[::-1]]))
    turned = source.permute(2, 1, 0) if list(target.shape) != shape else source
    if turned.shape != target.shape:
        turned = source.reshape(target.shape)
    places = [(row, cut) for row in range(target.shape[0]) for cut in range(target.shape[1]) if choose.random() < 0.8]
    choose.shuffle(places)
    loads = [(target[place], turned[place]) for place in places]
    for to, part in loads:
        to.copy_(part)
    again = torch.zeros_like(target)
    few = coalesced(copies_of(loads, target))
    for one in few:
        one.target.of(again).copy_(one.source.of(source))
    assert torch.equal(again, target)
    assert len(few) <= len(loads)
    assert sum(math.prod(c.size) for c in few) == sum(to.numel() for to, _ in loads)


def regions(*views: torch.Tensor) -> list[Region]:
    return [Region(size=tuple(v.shape), stride=v.stride(), offset=v.storage_offset()) for v in views]


def test_regions_must_be_a_partition():
    whole = torch.zeros(6, 4)
    problem = lambda *views: coverage_problem(regions(*views), (6, 4), (4, 1))
    assert problem(whole) is None
    assert problem(whole[:, :1], whole[:, 1:]) is None
    assert problem(whole[::2], whole[1::2]) is None
    assert problem(whole.t()) is None
    assert "4 of 24 elements come from no" in problem(whole[1:])
    assert "twice" in problem(whole[:4], whole[3:5], whole[5:])
    assert "twice" in problem(whole[:, :3], whole[:, 2:3])  # 24 elements, a column twice, one never
    assert "gaps" in coverage_problem(regions(whole), (6, 4), (8, 1))


# Layers whose loading or processing is not what a plan can do, in vLLM's real bracket.


def halves(param: nn.Parameter, loaded: torch.Tensor, half: int) -> None:
    """A loader of a fused layer: gate above up."""
    rows = param.shape[0] // 2
    param.data.narrow(0, half * rows, rows).copy_(loaded)


class Fused(nn.Module):
    """A fused layer with one weight; `process` is what its quantisation method does to it."""

    def __init__(self, process=None, rows: int = 4, columns: int = 8, loader=halves) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * rows, columns), requires_grad=False)
        self.weight.weight_loader = loader
        self.norm_like = nn.Parameter(torch.zeros(columns), requires_grad=False)
        if process is not None:
            self.quant_method = method_of(process)


def method_of(process):
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Method(QuantizeMethodBase):
        def create_weights(self, layer, *args, **kwargs):
            raise NotImplementedError

        def apply(self, layer, *args, **kwargs):
            raise NotImplementedError

        def process_weights_after_loading(self, layer):
            process(self, layer)

    return Method()


class Toy(nn.Module):
    """Two fused layers, of which the second is always plain. Names: `one.gate`, `one.up`, `one.norm_like`, ..."""

    def __init__(self, process=None, **settings) -> None:
        super().__init__()
        self.one = Fused(process, **settings)
        self.two = Fused()

    def load_weights(self, weights):
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        for name, weight in weights:
            if "rotary" in name:
                continue
            layer, part = name.rsplit(".", 1)
            layer = self.get_submodule(layer)
            if part in ("gate", "up"):
                layer.weight.weight_loader(layer.weight, weight, ("gate", "up").index(part))
            else:
                param = getattr(layer, part)
                getattr(param, "weight_loader", default_weight_loader)(param, weight)


def weights_of(seed: int, layers=("one", "two"), rows: int = 4, columns: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (rows, columns), "up": (rows, columns), "norm_like": (columns,)}
    return {f"{la}.{part}": torch.randn(shape, generator=generator) for la in layers for part, shape in shapes.items()}


@pytest.fixture(scope="module")
def config():
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(DEMO_MODEL), enforce_eager=True).create_engine_config()


def initial(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """As vLLM starts an engine: metadata is recorded, weights are loaded and processed."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    record_metadata_for_reloading(model)
    model.load_weights(weights.items())
    for layer in model.modules():
        if (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
    return model


def manifest_of(weights) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights.items()}


def synced(model, config, weights, plan=None, chunk: int = 1, given: bool = True) -> LayerwiseReload:
    """One sync. The caller's memory is used again as soon as a chunk is loaded, as transports do."""
    reload = LayerwiseReload(model, config, plan)
    reload.begin(manifest_of(weights) if given else None)
    items = list(weights.items())
    for start in range(0, len(items), chunk):
        part = [(name, tensor.clone()) for name, tensor in items[start : start + chunk]]
        reload.load(part)
        for _, tensor in part:
            tensor.fill_(77)
    assert reload.missing() == []
    reload.finish()
    return reload


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a model computes with, also those that layers keep aside."""
    found = {}
    for name, layer in model.named_modules():
        found |= {f"{name}.{n}": t for n, t in own_tensors(layer).items()}
        found |= {f"{name}#{i}": t for i, t in enumerate(held_tensors(layer).values())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.stride() == expected[name].stride(), name
        assert torch.equal(tensor, expected[name]), name


def planned_equals_slow(make, config, weights=weights_of, chunk: int = 1):
    """Learn, then sync moved weights with the plan; the same syncs without it must leave the same bits everywhere."""
    with_plan, without = initial(make(), weights(0)), initial(make(), weights(0))
    plan = synced(with_plan, config, weights(1), chunk=chunk).learned
    addresses = {name: p.data_ptr() for name, p in with_plan.named_parameters()}
    reload = LayerwiseReload(with_plan, config, plan)
    synced(with_plan, config, weights(2), plan, chunk)
    for seed in (1, 2):
        synced(without, config, weights(seed), chunk=chunk)
    assert_same(state(with_plan), state(without))
    assert {name: p.data_ptr() for name, p in with_plan.named_parameters()} == addresses
    assert reload.learned is plan
    return plan


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
def test_plain_layers_are_planned(config, process, chunk):
    plan = planned_equals_slow(lambda: Toy(process), config, chunk=chunk)
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


def derive(method, layer):
    layer.cache = layer.weight.sum(0)


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
def test_layers_that_processing_changes_stay_with_vllm(config, process, reason):
    plan = planned_equals_slow(lambda: Toy(process), config)
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


def twice(param, loaded, half):
    halves(param, loaded, half)
    halves(param, loaded, half)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (doubling, "computed or cast on the way"),
        (in_place_after, "computes with its weights .*aten::mul_"),
        (spreading, "spread over several elements"),
    ],
)
def test_loaders_that_do_more_than_copy_stay_with_vllm(config, loader, reason):
    plan = planned_equals_slow(lambda: Toy(loader=loader), config)
    assert plan.slow.keys() == {"one"}
    assert re.search(reason, plan.slow["one"]), plan.slow


def test_a_cast_stays_with_vllm(config):
    def half_precision(seed):
        return {n: t.bfloat16() if n == "one.up" else t for n, t in weights_of(seed).items()}

    plan = planned_equals_slow(Toy, config, half_precision)
    assert "cast" in plan.slow["one"]
    assert plan.slow.keys() == {"one"}


def test_sources_that_load_weights_cuts_and_turns_are_known(config):
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

    plan = planned_equals_slow(Turning, config, stored)
    assert plan.slow == {}
    assert len(plan.copies["one.both"]) == 1


def test_constant_weights_prove_nothing(config):
    def constant(seed):
        return {n: torch.full_like(t, 3) if n == "one.up" else t for n, t in weights_of(seed).items()}

    model = initial(Toy(swap_halves_unseen), constant(0))
    plan = synced(model, config, {n: torch.ones_like(t) for n, t in constant(0).items()}).learned
    assert plan.slow == dict.fromkeys(("one", "two"), "Fused: constant weights prove nothing")
    plan = planned_equals_slow(Toy, config, constant)
    assert plan.slow == {"one": "Fused: constant weights prove nothing"}


def test_vectors_may_be_constant(config):
    flat = lambda seed: {n: torch.ones_like(t) if "norm" in n else t for n, t in weights_of(seed).items()}
    assert planned_equals_slow(Toy, config, flat).slow == {}


# What comes is not what was learned from.


def test_other_tensors_are_learned_anew(config):
    def fused(seed):
        return {n.replace("one.", "one.own_"): t for n, t in weights_of(seed).items()}

    class Both(Toy):
        def load_weights(self, weights):
            super().load_weights([(name.replace("own_", ""), weight) for name, weight in weights])

    model, other = initial(Both(), weights_of(0)), initial(Both(), weights_of(0))
    first = synced(model, config, weights_of(1)).learned
    again = synced(model, config, fused(2), first)
    assert again.learned is not first
    assert again.learned.manifest.keys() == fused(0).keys()
    synced(other, config, weights_of(1))
    synced(other, config, fused(2))
    assert_same(state(model), state(other))


def test_a_layer_that_gets_planned_and_other_tensors_is_never_closed(config):
    class Both(Toy):
        def load_weights(self, weights):
            super().load_weights([(name.replace("own_", ""), weight) for name, weight in weights])

    model = initial(Both(), weights_of(0))
    plan = synced(model, config, weights_of(1)).learned
    reload = LayerwiseReload(model, config, plan)
    reload.begin()
    reload.load([(n.replace("one.up", "one.own_up"), t) for n, t in weights_of(2).items()])
    assert reload.missing() == ["one (Fused): 40 of 72 elements, and 32 that the plan does not know"]
    reload.load([("one.up", weights_of(2)["one.up"])])
    assert reload.missing() == ["one (Fused): 72 of 72 elements, and 32 that the plan does not know"]
    with pytest.raises(r3.SyncError, match=r"both planned tensors and others.*\n  one"):
        reload.finish()
    reload.abandon()
    synced(model, config, weights_of(3), plan)
    other = initial(Both(), weights_of(0))
    synced(other, config, weights_of(3))
    assert_same(state(model), state(other))


def test_tensors_of_another_shape_or_dtype_are_not_the_plans(config):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, config, weights_of(1)).learned
    for change in (lambda t: t.double(), lambda t: t[:, :4]):
        weights = weights_of(2) | {"one.up": change(weights_of(2)["one.up"])}
        reload = LayerwiseReload(model, config, plan)
        reload.begin(manifest_of(weights))
        assert not reload.planned
        reload.abandon()


def test_an_engine_whose_tensors_have_changed_is_learned_anew(config, caplog):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, config, weights_of(1)).learned
    model.one.weight = nn.Parameter(torch.zeros(8, 8).t(), requires_grad=False)
    reload = LayerwiseReload(model, config, plan)
    reload.begin(manifest_of(weights_of(2)))
    assert not reload.planned
    assert "tensors have changed" in caplog.text
    reload.abandon()


@pytest.mark.parametrize("lost", ["one.up", "two.norm_like"])
def test_a_sync_that_is_not_complete_teaches_nothing(config, lost):
    model = initial(Toy(), weights_of(0))
    reload = LayerwiseReload(model, config)
    reload.begin()
    reload.load([item for item in weights_of(1).items() if item[0] != lost])
    assert reload.learned is None
    assert [text.split()[0] for text in reload.missing()] == [lost.split(".")[0]]
    reload.finish()
    assert reload.learned is None


def test_a_planned_sync_that_is_not_complete_is_missing_something(config):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, config, weights_of(1)).learned
    reload = LayerwiseReload(model, config, plan)
    reload.begin()
    reload.load([item for item in weights_of(2).items() if item[0] != "one.up"])
    reload.load([("one.gate", weights_of(2)["one.gate"])])  # twice: counted once
    assert reload.missing() == ["one (Fused): 40 of 72 elements"]


# Tensors that reach several layers, none, or a layer at once.


class Sharing(Toy):
    """`shared` feeds the norms of both layers."""

    def load_weights(self, weights):
        spread = []
        for name, weight in weights:
            spread += [(f"{la}.norm_like", weight) for la in ("one", "two")] if name == "shared" else [(name, weight)]
        super().load_weights(spread)


def sharing(seed):
    weights = weights_of(seed)
    del weights["one.norm_like"]
    weights["shared"] = weights.pop("two.norm_like")
    return weights


@pytest.mark.parametrize(("process", "slow"), [(None, set()), (derive, {"one", "two"})])
def test_a_tensor_of_two_layers_reaches_both(config, process, slow):
    plan = planned_equals_slow(lambda: Sharing(process), config, sharing)
    assert plan.slow.keys() == slow
    if slow:
        assert "shares a checkpoint tensor" in plan.slow["two"]
    else:
        assert {c.layer for c in plan.copies["shared"]} == {"one", "two"}


def test_layers_that_load_the_same_memory_stay_with_vllm(config):
    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.two.weight = self.one.weight

    same = lambda seed: (w := weights_of(seed)) | {f"two.{part}": w[f"one.{part}"] for part in ("gate", "up")}
    plan = planned_equals_slow(Tied, config, same)
    assert {text.partition(": ")[2] for text in plan.slow.values()} == {"several layers load the same memory"}


def test_a_layer_tied_to_a_complete_one_is_not_missing(config):
    class Head(nn.Module):
        pass

    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.head = Head()
            self.head.weight = self.one.weight

    plan = planned_equals_slow(Tied, config)  # asserts that nothing is missing, with and without the plan
    assert plan.layers.keys() == {"one", "two"}
    reload = LayerwiseReload(model := initial(Tied(), weights_of(0)), config)
    reload.begin()
    reload.load([item for item in weights_of(1).items() if item[0] != "one.up"])
    assert [text.split()[0] for text in reload.missing()] == ["one", "head"]
    reload.abandon()
    assert model.head.weight is model.one.weight


def test_what_vllm_ignores_is_dropped_without_asking_it_again(config):
    with_rotary = lambda seed: weights_of(seed) | {"one.rotary": torch.randn(5)}
    plan = planned_equals_slow(Toy, config, with_rotary)
    assert plan.dropped == {"one.rotary"}
    model = initial(Toy(), weights_of(0))
    plan = synced(model, config, with_rotary(1)).learned
    model.load_weights = None  # nothing is left for it
    synced(model, config, with_rotary(2), plan)


def test_tensors_that_came_too_late_are_not_taken_for_ignored(config):
    """A loader that copies more than its parameter holds closes its layer early in vLLM's eyes; the rest is lost."""

    class Caching(Toy):
        def load_weights(self, weights):
            loaders = {name: self.get_submodule(name).norm_like for name in ("one", "two")}
            for name, weight in weights:
                layer, part = name.split(".")
                if part == "norm_like" and hasattr(loaders[layer], "weight_loader"):
                    loaders[layer].weight_loader(loaders[layer], weight)
                else:
                    super().load_weights([(name, weight)])

    model = initial(Caching(loader=twice), weights_of(0))
    learned = synced(model, config, weights_of(1), chunk=100).learned
    assert "8 of 8 elements come from no" in learned.slow["one"] or "loaded twice" in learned.slow["one"]
    assert learned.dropped == frozenset()


class Biased(Toy):
    """A router's correction bias, which vLLM never moves to the meta device: it is loaded at once."""

    def __init__(self, process=None):
        super().__init__(process)
        self.one.e_score_correction_bias = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.two.e_score_correction_bias = self.one.e_score_correction_bias  # as experts hold their router's
        self.alone = nn.Module()
        self.alone.e_score_correction_bias = nn.Parameter(torch.zeros(4), requires_grad=False)


def biased(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    names = ("one.e_score_correction_bias", "alone.e_score_correction_bias")
    return weights_of(seed) | {name: torch.randn(4, generator=generator) for name in names}


@pytest.mark.parametrize(("process", "slow"), [(None, set()), (derive, {"one"})])
def test_a_correction_bias_follows(config, process, slow):
    plan = planned_equals_slow(lambda: Biased(process), config, biased)
    assert plan.slow.keys() == slow
    assert plan.layers.keys() == {"one", "two", "alone"} - slow


def test_a_layer_written_after_it_was_complete_stays_with_vllm(config):
    """As checkpoints that hold a value once for each part of a fused layer: the last one stands."""

    class Late(Toy):
        def load_weights(self, weights):
            for name, weight in weights:
                if name == "one.second":
                    self.one.norm_like.data.copy_(weight)
                else:
                    super().load_weights([(name, weight)])

    twice_stored = lambda seed: weights_of(seed) | {"one.second": weights_of(seed + 10)["one.norm_like"]}
    plan = planned_equals_slow(Late, config, twice_stored)
    assert plan.slow == {"one": "Fused: it is touched after it was complete"}


def test_layers_that_loading_reads_stay_with_vllm(config):
    class Deriving(Toy):
        def load_weights(self, weights):
            super().load_weights(weights)
            if not self.one.norm_like.is_meta and not self.two.norm_like.is_meta:
                self.one.norm_like.data.copy_(self.two.norm_like.data)

    model = initial(Deriving(), weights_of(0))
    assert synced(model, config, weights_of(1), chunk=100).learned.slow.keys() == {"one", "two"}


# The bracket.


def test_planned_layers_are_not_called_failed_and_absent_ones_are(config):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    try:
        model = initial(Toy(derive), weights_of(0))
        plan = synced(model, config, weights_of(1)).learned
        synced(model, config, weights_of(2), plan)
        assert records == []
        reload = LayerwiseReload(model, config, plan)
        reload.begin()
        reload.finish()
        assert records == ["Fused: Failed to load weights"]  # the slow one
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.mark.parametrize("planned", [False, True])
def test_an_abandoned_sync_leaves_a_model_that_runs_and_the_next_one_is_right(config, planned):
    model, other = initial(Toy(derive), weights_of(0)), initial(Toy(derive), weights_of(0))
    plan = synced(model, config, weights_of(1)).learned if planned else None
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    reload = LayerwiseReload(model, config, plan)
    reload.begin()
    reload.load(list(weights_of(2).items())[:2])
    assert model.one.weight.is_meta
    reload.abandon()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    assert not any(p.is_meta for p in model.parameters())
    synced(model, config, weights_of(3), plan)
    synced(other, config, weights_of(3))
    assert_same(state(model), state(other))


def test_a_sync_that_was_just_left_does_not_count_in_the_next_one(config):
    model = initial(Toy(), weights_of(0))
    left, reload = LayerwiseReload(model, config), LayerwiseReload(model, config)
    left.begin()
    left.load(list(weights_of(2).items())[:2])
    reload.begin()
    assert reload.missing() == [f"{layer} (Fused): 0 of 72 elements" for layer in ("one", "two")]
    reload.abandon()


class Runner(nn.Module):
    """The part of vLLM's `MoERunner` that joins the gates, once."""

    def __init__(self, one, two):
        super().__init__()
        self.gate, self.shared_expert_gate = one, two
        self._combined_gate_weight = None

    def join(self):
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        MoERunner._maybe_fuse_gate_weights(self)
        return self._combined_gate_weight


@pytest.mark.parametrize("planned", [False, True])
def test_joined_gates_follow_and_stay_where_they_are(config, planned):
    class Joined(Toy):
        def __init__(self):
            super().__init__()
            self.runner = Runner(self.one, self.two)

    model = initial(Joined(), weights_of(0))
    joined = model.runner.join()
    plan = synced(model, config, weights_of(1)).learned
    synced(model, config, weights_of(2), plan if planned else None)
    assert model.runner.join() is joined
    assert torch.equal(joined, torch.cat([model.one.weight, model.two.weight]))
    model.runner.shared_expert_gate.weight = nn.Parameter(torch.zeros(3, 8))
    join_gates(model)
    assert model.runner._combined_gate_weight is None


def test_plans_cross_processes(config):
    import pickle

    plan = synced(initial(Toy(derive), weights_of(0)), config, weights_of(1)).learned
    assert pickle.loads(pickle.dumps(plan)) == plan


# vLLM's own layers. On CPU they prepack their weights; as on a GPU, they leave them alone where `raw` says so.


@contextlib.contextmanager
def raw():
    """Linear layers and experts without the prepacking of CPU builds: processing is otherwise vLLM's own."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.v1.attention.backends.mla.amx_mla import AMXMLAImpl

    def dispatch(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    patch = pytest.MonkeyPatch()
    patch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)
    patch.setattr(cpu_moe.CPUUnquantizedExperts, "process_weights_after_loading", lambda self, layer: None)
    if not torch.accelerator.is_available():
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM 0.32's CPU worker has it
    patch.setattr(AMXMLAImpl, "uses_amx_bmm", False)
    patch.setattr(AMXMLAImpl, "process_weights_after_loading", lambda self, act_dtype: None)
    try:
        yield
    finally:
        patch.undo()


def random_weights(seed: int, fused: bool, path: Path = DEMO_MODEL) -> dict[str, torch.Tensor]:
    """Random weights for a model, by the names of its checkpoint or (the demo's) those of transformers 5."""
    generator = torch.Generator().manual_seed(seed)
    stored = load_file(path / "model.safetensors")
    weights = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in sorted(stored.items())}
    weights |= {n: t.float() for n, t in weights.items() if "correction_bias" in n}  # as DeepSeek's checkpoints
    if not fused:
        return weights
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        weights |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    return weights


def real_model(path: Path):
    """vLLM's own model, loaded from its checkpoint, as one rank of this process group; and its configuration."""
    import torch.distributed as dist
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    size, rank = dist.get_world_size(), dist.get_rank()
    settings = {"tensor_parallel_size": size, "enforce_eager": True, "dtype": "bfloat16"}
    config = EngineArgs(model=str(path), **settings).create_engine_config()  # type: ignore[arg-type]
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])  # names vLLM's shared memory
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(size, rank, "env://", rank, "gloo")
            initialize_model_parallel(size, 1)
        return get_model(vllm_config=config), config


def real_job(path: Path, fused: bool) -> dict:
    """Planned against slow with vLLM's model, over two syncs of random weights; what the plan says of itself."""
    with raw():
        with_plan, config = real_model(path)
        without, _ = real_model(path)
        plan = synced(with_plan, config, random_weights(1, fused, path), chunk=40).learned
        learned = tensors_of(with_plan)
        for name in plan.layers:  # as memory that has slept: what no source fills is filled anew
            for fill in plan.layers[name].fills:
                fill.region.of(own_tensors(with_plan.get_submodule(name))[fill.tensor]).fill_(77)
        synced(with_plan, config, random_weights(2, fused, path), plan, chunk=40)
        for seed in (1, 2):
            synced(without, config, random_weights(seed, fused, path), chunk=1000)
        assert_same(tensors_of(with_plan), tensors_of(without))
    changed = [name for name, tensor in tensors_of(with_plan).items() if not torch.equal(tensor, learned[name])]
    fills = [fill for layer in plan.layers.values() for fill in layer.fills]
    assert {c.layer for group in plan.copies.values() for c in group} == plan.layers.keys()
    return plan.describe() | {"changed": changed, "fills": len(fills)}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    made = Ranks(request.param)
    made.size = request.param
    yield made
    made.close()


@pytest.mark.parametrize("fused", [True, False])
def test_vllms_own_layers_are_planned_tensor_parallel_too(ranks, fused):
    """A copy a checkpoint tensor: a fused one of 32 experts too, whose gates and ups lie in turns."""
    for found in ranks.all(real_job, DEMO_MODEL, fused, timeout_s=200):
        sources = 3 + LAYERS * (4 + 2 + 2 + 1 + (2 if fused else 3 * EXPERTS))
        assert found["layers_slow"] == 0, found
        assert found["copies"] == found["sources_planned"] == sources
        assert found["sources_dropped"] == found["sources_slow"] == 0
        whole = sum(t.nbytes for t in random_weights(0, fused).values())
        assert found["bytes_planned"] == whole if ranks.size == 1 else found["bytes_planned"] < 0.6 * whole


def test_latent_attention_derives_from_planned_weights_and_padded_rows_stay_zero(ranks, tmp_path):
    """DeepSeek-V3: W_UK and W_UV come of `kv_b_proj`; 100 words are padded to 128; routers have a correction bias."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32)
    heads |= dict(qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, max_position_embeddings=64)
    experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1)
    experts |= dict(first_k_dense_replace=1, topk_method="noaux_tc")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **experts, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for rank, found in enumerate(ranks.all(real_job, tmp_path, False, timeout_s=200)):
        assert found["slow_reasons"] == {}
        assert found["fills"] == (2 if rank == ranks.size - 1 else 0)  # of embedding and head, in the last rank's part
        for layer in (0, 1):
            for derived in ("W_UV", "W_UK_T"):
                assert f"model.layers.{layer}.self_attn.mla_attn.mla_attn.{derived}" in found["changed"], found
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in found["changed"]


# The engine, with its prepacked weights: vLLM's loaders for these, the plan for the rest.


class PlanWorker:
    """A worker extension that syncs from a file, with or without what it has learned."""

    def r3_plan_sync(self, path: str, use: bool) -> dict:
        plan = self.__dict__.get("r3_learned") if use else None
        made = synced(self.model_runner.model, self.vllm_config, load_file(path), plan, chunk=50)  # type: ignore[attr-defined]
        self.__dict__["r3_learned"] = made.learned
        return made.learned.describe() | {"again": made.learned is plan, "slow": made.learned.slow}


@pytest.fixture(scope="module")
def plan_engine(demo_config):
    from vllm import LLM

    from r3.capture import engine_kwargs

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    llm = LLM(**engine_kwargs(demo_config) | {"worker_extension_cls": "test_load_plan.PlanWorker"})
    yield llm
    llm.llm_engine.engine_core.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def greedy(engine) -> list[list[tuple[int, float]]]:
    from vllm import SamplingParams

    assert engine.reset_prefix_cache()
    ids = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
    done = [engine.generate({"prompt_token_ids": row}, sampling, use_tqdm=False)[0].outputs[0] for row in ids]
    return [[(t, entry[t].logprob) for t, entry in zip(c.token_ids, c.logprobs, strict=True)] for c in done]


@pytest.mark.engine
@pytest.mark.long
def test_an_engine_says_the_same_after_planned_syncs_and_after_slow_ones(plan_engine, tmp_path):
    stored = load_file(DEMO_MODEL / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {
        n: (t.float() + 0.02 * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for n, t in stored.items()
    }
    moved |= {n: t + 0.1 for n, t in stored.items() if "norm" in n}
    paths = {"stored": stored, "moved": moved}
    for name, weights in paths.items():
        save_file(weights, tmp_path / name)
    sync = lambda name, use: plan_engine.collective_rpc("r3_plan_sync", args=(str(tmp_path / name), use))[0]

    reference = greedy(plan_engine)
    learned = sync("stored", False)
    assert greedy(plan_engine) == reference
    # Norms are as their sources have them; the rest is prepacked by CPU builds.
    assert learned["layers_planned"] == LAYERS * 4 + 1 == learned["copies"]
    assert learned["layers_slow"] == LAYERS * 4 + 2
    kinds = {reason.partition(":")[0] for reason in learned["slow"].values()}
    assert {"RoutedExperts", "QKVParallelLinear", "RowParallelLinear", "ParallelLMHead"} <= kinds

    assert sync("stored", True)["again"]
    assert greedy(plan_engine) == reference
    assert sync("moved", True)["again"]
    planned = greedy(plan_engine)
    assert not sync("moved", False)["again"]
    assert greedy(plan_engine) == planned != reference
    assert sync("stored", True)["again"]
    assert greedy(plan_engine) == reference
