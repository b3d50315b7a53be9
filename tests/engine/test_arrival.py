"""`arrival` tells weights that change what the engine computes from those of which it keeps old copies."""

import contextlib

import pytest
import torch
from sync_helpers import greedy
from transformers import AutoModelForCausalLM

import r3
from r3.doctor.arrival import KindArrival, _changed, _judge, _kinds, arrival
from r3.weight_sync import WeightSync


class Stale(WeightSync):
    """An engine that keeps the copy of a weight that it got first."""

    def push(self, named_tensors, **options):
        kept = self.__dict__.setdefault("kept", {})
        sent = []
        for name, weight in named_tensors:
            tensor = r3.weight_sync.gathered(weight)
            if "o_proj" in name:
                tensor = kept.setdefault(name, tensor.clone())
            sent.append((name, tensor))
        return super().push(sent, **options)


@pytest.fixture(scope="module")
def replay(demo_config):
    path = demo_config.trainer.policy.model.path
    return r3.attach(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval())


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(900)  # some fifteen syncs, answers and forwards
def test_a_stale_weight_is_named_and_no_other(engine, reference, replay):
    before = {name: tensor.clone() for name, tensor in replay.model.state_dict().items()}
    with contextlib.closing(Stale(engine, dtype=torch.bfloat16, timeout_s=120)) as sync:
        found = arrival(sync, engine, replay)
    assert found.stale == ("model.layers.*.self_attn.o_proj.weight",)
    assert len(found.kinds) == len(_kinds(replay.model))
    with pytest.raises(r3.SyncError, match=r"(?s)1 kinds of weights do not change.*o_proj"):
        found.require()
    assert all(torch.equal(tensor, before[name]) for name, tensor in replay.model.state_dict().items())
    assert greedy(engine) == reference  # the engine has the weights as they were
    assert found.version == sync.version


def test_kinds_are_names_that_differ_by_numbers_alone(replay):
    kinds = _kinds(replay.model)
    layers = replay.model.config.num_hidden_layers
    assert len(kinds["model.layers.*.mlp.gate.weight"]) == layers
    assert len(kinds["model.norm.weight"]) == 1
    held = {id(tensor) for tensor in replay.model.state_dict(keep_vars=True).values()}
    assert {id(tensor) for group in kinds.values() for tensor in group} == held


def test_a_change_is_undone_to_the_bit_also_after_an_exception(replay):
    (kind, weights), *_ = _kinds(replay.model).items()
    before = [tensor.detach().clone() for tensor in weights]

    def fail() -> None:
        with _changed(weights, 0.5):
            assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
            raise ValueError(kind)

    with pytest.raises(ValueError, match=kind.replace("*", ".")):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def figures(k3: float, rows: float) -> dict[str, float]:
    return {"logprob_diff/replayed/k3": k3, "logprob_diff/live/k3": k3, "routing/differing_rows": rows}


@pytest.mark.parametrize(
    ("after", "before", "arrived"),
    [
        (figures(2e-4, 0.01), figures(0.2, 0.3), True),
        (figures(0.2, 0.3), figures(2e-4, 0.01), False),
        (figures(2e-4, 0.01), figures(3e-4, 0.012), None),  # arithmetic
        (figures(2e-4, 0.01), figures(2e-4, 0.4), True),  # a selection bias: replayed log-probabilities are blind to it
        (figures(2e-4, 0.4), figures(2e-4, 0.01), False),
    ],
)
def test_the_measure_that_tells_them_apart_decides(after, before, arrived):
    expected = KindArrival(
        kind="k", weights=1, arrived=arrived, with_change=after["logprob_diff/replayed/k3"],
        without=before["logprob_diff/replayed/k3"],
    )  # fmt: skip
    assert _judge("k", 1, after, before) == expected
