"""Syncs that are not what a plan was learned from: other tensors, missing ones, shared memory, gates that move."""

import logging

import pytest
import torch
from plan_toys import (
    Toy,
    assert_same,
    derive,
    initial,
    manifest_of,
    planned_equals_slow,
    state,
    synced,
    twice,
    weights_of,
)
from torch import nn

import r3
from r3.weight_sync.worker import reload as reload_module
from r3.weight_sync.worker.reload import LayerwiseReload, join_gates


def test_other_tensors_are_learned_anew(vllm_config):
    def fused(seed):
        return {n.replace("one.", "one.own_"): t for n, t in weights_of(seed).items()}

    class Both(Toy):
        def load_weights(self, weights):
            super().load_weights([(name.replace("own_", ""), weight) for name, weight in weights])

    model, other = initial(Both(), weights_of(0)), initial(Both(), weights_of(0))
    first = synced(model, vllm_config, weights_of(1)).learned
    again = synced(model, vllm_config, fused(2), first)
    assert again.learned is not first
    assert again.learned.manifest.keys() == fused(0).keys()
    synced(other, vllm_config, weights_of(1))
    synced(other, vllm_config, fused(2))
    assert_same(state(model), state(other))


def test_a_layer_that_gets_planned_and_other_tensors_is_never_closed(vllm_config):
    class Both(Toy):
        def load_weights(self, weights):
            super().load_weights([(name.replace("own_", ""), weight) for name, weight in weights])

    model = initial(Both(), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    reload = LayerwiseReload(model, vllm_config, plan)
    reload.begin()
    reload.load([(n.replace("one.up", "one.own_up"), t) for n, t in weights_of(2).items()])
    assert reload.missing() == ["one (Fused): 40 of 72 elements, and 32 that the plan does not know"]
    reload.load([("one.up", weights_of(2)["one.up"])])
    assert reload.missing() == ["one (Fused): 72 of 72 elements, and 32 that the plan does not know"]
    with pytest.raises(r3.SyncError, match=r"both planned tensors and others.*\n  one"):
        reload.finish()
    reload.abandon()
    synced(model, vllm_config, weights_of(3), plan)
    other = initial(Both(), weights_of(0))
    synced(other, vllm_config, weights_of(3))
    assert_same(state(model), state(other))


def test_tensors_of_another_shape_or_dtype_are_not_the_plans(vllm_config):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    for change in (lambda t: t.double(), lambda t: t[:, :4]):
        weights = weights_of(2) | {"one.up": change(weights_of(2)["one.up"])}
        reload = LayerwiseReload(model, vllm_config, plan)
        reload.begin(manifest_of(weights))
        assert not reload.planned
        reload.abandon()


def test_an_engine_whose_tensors_have_changed_is_learned_anew(vllm_config, caplog):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    model.one.weight = nn.Parameter(torch.zeros(8, 8).t(), requires_grad=False)
    reload = LayerwiseReload(model, vllm_config, plan)
    reload.begin(manifest_of(weights_of(2)))
    assert not reload.planned
    assert "tensors have changed" in caplog.text
    reload.abandon()


@pytest.mark.parametrize(
    ("process", "part", "stay"),
    [(None, slice(None), True), (None, slice(1, None), False), (derive, slice(None), False)],
)
def test_layers_stay_where_they_are_only_where_the_plan_covers_every_tensor(vllm_config, process, part, stay):
    """vLLM's reload puts them on the meta device."""
    model = initial(Toy(process), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    weights = dict(list(weights_of(2).items())[part])
    reload = LayerwiseReload(model, vllm_config, plan)
    reload.begin(manifest_of(weights))
    assert all(not tensor.is_meta for tensor in model.parameters()) == stay
    if stay:
        with pytest.raises(r3.SyncError, match=r"one\.other: expected what the manifest announced, got \(3,\)"):
            reload.load([("one.other", torch.ones(3))])
        assert len(reload.missing()) == 2
    reload.abandon()


def test_attention_derives_from_the_new_weights_where_no_reload_is_opened(vllm_config, monkeypatch):
    class Attention(nn.Module):
        def process_weights_after_loading(self, act_dtype):
            self.derived = act_dtype, model.one.weight.detach().clone(), model.two.weight.detach().clone()

    model = initial(Toy(), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    model.attention = Attention()
    monkeypatch.setattr(reload_module, "is_deferred", lambda layer: isinstance(layer, Attention))
    synced(model, vllm_config, weights_of(2), plan)
    dtype, one, two = model.attention.derived
    assert dtype == vllm_config.model_config.dtype
    assert torch.equal(one, torch.cat([weights_of(2)["one.gate"], weights_of(2)["one.up"]]))
    assert torch.equal(two, torch.cat([weights_of(2)["two.gate"], weights_of(2)["two.up"]]))


def test_a_chunk_of_any_size_is_copied_aside_in_parts(vllm_config, monkeypatch):
    """One of the trainer's own weights has 4 GiB by ipc: more than an engine may have room for beside its own."""
    loaded = []

    class Counting(Toy):
        def load_weights(self, weights):
            loaded.append(weights := list(weights))
            super().load_weights(weights)

    model = initial(Counting(), weights_of(0))
    loaded.clear()
    whole = synced(model, vllm_config, weights_of(1), chunk=6).learned
    assert [len(part) for part in loaded] == [6]
    expected = state(model)
    model = initial(Counting(), weights_of(0))
    monkeypatch.setattr(reload_module, "_ASIDE_BYTES", 4 * (32 + 8))
    loaded.clear()
    plan = synced(model, vllm_config, weights_of(1), chunk=6).learned
    assert [len(part) for part in loaded] == [1, 2, 1, 2], "160 bytes at most: 32 and 8 numbers"
    assert_same(state(model), expected)
    assert plan == whole


@pytest.mark.parametrize("lost", ["one.up", "two.norm_like"])
def test_a_sync_that_is_not_complete_teaches_nothing(vllm_config, lost):
    model = initial(Toy(), weights_of(0))
    reload = LayerwiseReload(model, vllm_config)
    reload.begin()
    reload.load([item for item in weights_of(1).items() if item[0] != lost])
    assert reload.learned is None
    assert [text.split()[0] for text in reload.missing()] == [lost.split(".")[0]]
    reload.finish()
    assert reload.learned is None


def test_a_planned_sync_that_is_not_complete_is_missing_something(vllm_config):
    model = initial(Toy(), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned
    reload = LayerwiseReload(model, vllm_config, plan)
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
def test_a_tensor_of_two_layers_reaches_both(vllm_config, process, slow):
    plan = planned_equals_slow(lambda: Sharing(process), vllm_config, sharing)
    assert plan.slow.keys() == slow
    if slow:
        assert "shares a checkpoint tensor" in plan.slow["two"]
    else:
        assert {c.layer for c in plan.copies["shared"]} == {"one", "two"}


def test_layers_that_load_the_same_memory_stay_with_vllm(vllm_config):
    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.two.weight = self.one.weight

    same = lambda seed: (w := weights_of(seed)) | {f"two.{part}": w[f"one.{part}"] for part in ("gate", "up")}
    plan = planned_equals_slow(Tied, vllm_config, same)
    assert {text.partition(": ")[2] for text in plan.slow.values()} == {"several layers load the same memory"}


def test_a_layer_tied_to_a_complete_one_is_not_missing(vllm_config):
    class Head(nn.Module):
        pass

    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.head = Head()
            self.head.weight = self.one.weight

    plan = planned_equals_slow(Tied, vllm_config)  # asserts that nothing is missing, with and without the plan
    assert plan.layers.keys() == {"one", "two"}
    reload = LayerwiseReload(model := initial(Tied(), weights_of(0)), vllm_config)
    reload.begin()
    reload.load([item for item in weights_of(1).items() if item[0] != "one.up"])
    assert [text.split()[0] for text in reload.missing()] == ["one", "head"]
    reload.abandon()
    assert model.head.weight is model.one.weight


def test_what_vllm_ignores_is_dropped_without_asking_it_again(vllm_config):
    with_rotary = lambda seed: weights_of(seed) | {"one.rotary": torch.randn(5)}
    plan = planned_equals_slow(Toy, vllm_config, with_rotary)
    assert plan.dropped == {"one.rotary"}
    model = initial(Toy(), weights_of(0))
    plan = synced(model, vllm_config, with_rotary(1)).learned
    model.load_weights = None  # nothing is left for it
    synced(model, vllm_config, with_rotary(2), plan)


def test_tensors_that_came_too_late_are_not_taken_for_ignored(vllm_config):
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
    learned = synced(model, vllm_config, weights_of(1), chunk=100).learned
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
def test_a_correction_bias_follows(vllm_config, process, slow):
    plan = planned_equals_slow(lambda: Biased(process), vllm_config, biased)
    assert plan.slow.keys() == slow
    assert plan.layers.keys() == {"one", "two", "alone"} - slow


def test_a_layer_written_after_it_was_complete_stays_with_vllm(vllm_config):
    """As checkpoints that hold a value once for each part of a fused layer: the last one stands."""

    class Late(Toy):
        def load_weights(self, weights):
            for name, weight in weights:
                if name == "one.second":
                    self.one.norm_like.data.copy_(weight)
                else:
                    super().load_weights([(name, weight)])

    twice_stored = lambda seed: weights_of(seed) | {"one.second": weights_of(seed + 10)["one.norm_like"]}
    plan = planned_equals_slow(Late, vllm_config, twice_stored)
    assert plan.slow == {"one": "Fused: it is touched after it was complete"}


def test_layers_that_loading_reads_stay_with_vllm(vllm_config):
    class Deriving(Toy):
        def load_weights(self, weights):
            super().load_weights(weights)
            if not self.one.norm_like.is_meta and not self.two.norm_like.is_meta:
                self.one.norm_like.data.copy_(self.two.norm_like.data)

    model = initial(Deriving(), weights_of(0))
    assert synced(model, vllm_config, weights_of(1), chunk=100).learned.slow.keys() == {"one", "two"}


# The bracket.


def test_planned_layers_are_not_called_failed_and_absent_ones_are(vllm_config):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    try:
        model = initial(Toy(derive), weights_of(0))
        plan = synced(model, vllm_config, weights_of(1)).learned
        synced(model, vllm_config, weights_of(2), plan)
        assert records == []
        reload = LayerwiseReload(model, vllm_config, plan)
        reload.begin()
        reload.finish()
        assert records == ["Fused: Failed to load weights"]  # the slow one
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.mark.parametrize("planned", [False, True])
def test_an_abandoned_sync_leaves_a_model_that_runs_and_the_next_one_is_right(vllm_config, planned):
    model, other = initial(Toy(derive), weights_of(0)), initial(Toy(derive), weights_of(0))
    plan = synced(model, vllm_config, weights_of(1)).learned if planned else None
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    reload = LayerwiseReload(model, vllm_config, plan)
    reload.begin()
    reload.load(list(weights_of(2).items())[:2])
    assert model.one.weight.is_meta
    reload.abandon()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    assert not any(p.is_meta for p in model.parameters())
    synced(model, vllm_config, weights_of(3), plan)
    synced(other, vllm_config, weights_of(3))
    assert_same(state(model), state(other))


def test_a_sync_that_was_just_left_does_not_count_in_the_next_one(vllm_config):
    model = initial(Toy(), weights_of(0))
    left, reload = LayerwiseReload(model, vllm_config), LayerwiseReload(model, vllm_config)
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
def test_joined_gates_follow_and_stay_where_they_are(vllm_config, planned):
    class Joined(Toy):
        def __init__(self):
            super().__init__()
            self.runner = Runner(self.one, self.two)

    model = initial(Joined(), weights_of(0))
    joined = model.runner.join()
    plan = synced(model, vllm_config, weights_of(1)).learned
    synced(model, vllm_config, weights_of(2), plan if planned else None)
    assert model.runner.join() is joined
    assert torch.equal(joined, torch.cat([model.one.weight, model.two.weight]))
    model.runner.shared_expert_gate.weight = nn.Parameter(torch.zeros(3, 8))
    join_gates(model.modules())
    assert model.runner._combined_gate_weight is None


def test_plans_cross_processes(vllm_config):
    import pickle

    plan = synced(initial(Toy(derive), weights_of(0)), vllm_config, weights_of(1)).learned
    assert pickle.loads(pickle.dumps(plan)) == plan
