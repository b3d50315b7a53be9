"""What vLLM's layers hold besides weights is brought up to date by a sync, or the sync is refused by name."""

import json

import pytest
import torch
from derived_jobs import after_a_sync, ties
from places import SUPPORT
from plan_toys import Toy, initial, synced, weights_of
from ranks import Ranks
from torch import nn
from zoo.families import CASES

import r3
from r3.weight_sync.worker.derived_tensors import DerivedTensors, note_origins
from r3.weight_sync.worker.reload import LayerwiseReload


@pytest.fixture(scope="module")
def rank():
    made = Ranks(1)
    yield made
    made.close()


# Mamba's `conv_weights` is a view of a weight that CPU builds pack elsewhere, and vLLM's own `reload_weights` leaves it
# as it was (0.30); MLA derives W_UK_T and W_UV.
QUICK = ["granitemoehybrid", "deepseek_v3"]
STARTED = sorted(
    name
    for release in json.loads((SUPPORT / "zoo" / "engines.json").read_text()).values()
    for name, found in release.items()
    if found.get("starts")
    and found.get("implementation") == "vLLM"
    and name in CASES
    and "-" not in name
    # Its sync is refused: vLLM writes its experts and sinks past its own reload.
    and name != "gpt_oss"
)


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in STARTED if name not in QUICK)]
)
def test_a_model_that_was_synced_holds_what_one_that_loaded_the_weights_holds(rank, tmp_path, family):
    assert rank.all(after_a_sync, family, tmp_path, timeout_s=250) == [[]]


def test_what_the_engine_holds_as_one_is_known(rank, tmp_path):
    """vLLM 0.30 ties LFM2's head to its embeddings whatever the configuration says: the last one that comes wins."""
    assert rank.all(ties, "lfm2_moe", tmp_path, timeout_s=250) == [[("lm_head.weight", "model.embed_tokens.weight")]]


# Layers of vLLM's kinds of derived tensors, each of which a sync must find. `one.weight` is the weight.


class Copied(Toy):
    """Keeps a copy in another precision, made when the weights were loaded."""

    def derive(self):
        self.one.wide = self.one.weight.double()


class Cached(Toy):
    """Keeps a closure over what it made at its first forward."""

    def derive(self):
        scaled = self.two.weight * 2
        self.one.kernel = lambda x: x @ scaled.T


class Once(Toy):
    """Fuses after loading, and not again if that was done (as vision experts do in vLLM)."""

    def process_weights_after_loading(self):
        if "fused" not in self._buffers:
            self.register_buffer("fused", torch.cat([self.one.weight, self.two.weight]), persistent=False)

    derive = process_weights_after_loading


class Again(Toy):
    """Fuses anew whenever it is told to."""

    def process_weights_after_loading(self):
        self.register_buffer("fused", torch.cat([self.one.weight, self.two.weight]), persistent=False)

    derive = process_weights_after_loading


class Viewed(Toy):
    """A buffer that was a view of a weight, which is moved elsewhere once it is loaded (as CPU builds pack)."""

    def __init__(self) -> None:
        super().__init__(process=move)
        self.register_buffer("view", self.one.weight.view(-1, 2), persistent=False)

    def derive(self):
        pass


class Constant(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.one.table = torch.arange(5.0)
        self.two.register_buffer("table", torch.arange(6.0), persistent=False)

    def derive(self):
        pass


def move(method, layer):
    layer.weight.data = layer.weight.data.clone()


def started(model):
    """As vLLM builds and loads it."""
    note_origins(model)
    initial(model, weights_of(0))
    model.derive()
    return model


@pytest.mark.parametrize(("kind", "path"), [(Copied, "one.wide"), (Cached, "one.kernel"), (Once, "fused")])
def test_what_a_sync_cannot_renew_is_refused_by_name(vllm_config, kind, path):
    with pytest.raises(r3.SyncError, match=rf"1 tensors .*may derive from weights.*(?s:\n  {path})"):
        synced(started(kind()), vllm_config, weights_of(1))


def test_what_is_known_to_be_none_of_the_weights_business_is_let_through(vllm_config):
    model = started(Copied())
    reload = LayerwiseReload(model, vllm_config, derived=DerivedTensors(model, constants=["*.wide"]))
    reload.begin()
    reload.load(weights_of(1).items())
    reload.finish()


@pytest.mark.parametrize("kind", [Again, Viewed, Constant])
def test_what_derives_is_renewed_in_every_sync_planned_or_not(vllm_config, kind):
    model = started(kind())
    plan = synced(model, vllm_config, weights_of(1)).learned
    for seed in (2, 3):
        synced(model, vllm_config, weights_of(seed), plan)
        expected = started_with(kind(), weights_of(seed))
        if kind is Again:
            assert torch.equal(model.fused, torch.cat([expected.one.weight, expected.two.weight]))
        elif kind is Viewed:
            assert torch.equal(model.view, expected.one.weight.view(-1, 2))
        else:
            assert torch.equal(model.one.table, torch.arange(5.0))
            assert torch.equal(model.two.table, torch.arange(6.0))


def started_with(model: nn.Module, weights):
    return initial(model, weights)


def test_a_view_is_in_its_place_after_a_sync_that_was_given_up(vllm_config):
    model = started(Viewed())
    before = model.view
    reload = LayerwiseReload(model, vllm_config)
    reload.begin()
    reload.load(list(weights_of(1).items())[:1])
    reload.abandon()
    assert model.view is before
    synced(model, vllm_config, weights_of(2))
    assert torch.equal(model.view, model.one.weight.view(-1, 2))
