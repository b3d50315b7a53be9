"""Several recorders of one model: inside one another, in threads, after failures. Each has what its context saw."""

import threading

import pytest
import torch
from models import random_ids, tiny_moe, tokens
from zoo import CASES

import r3

FAMILIES = ["deepseek_v2-group_limited", "gemma4_text", "gpt_oss", "jetmoe", "llama4", "zaya"]


def run(model, seed: int = 0, **kwargs) -> None:
    with torch.no_grad():
        model(input_ids=tokens(seed=seed), use_cache=False, **kwargs)


def alone(seed: int) -> torch.Tensor:
    """What one recorder has of a live forward of `tokens(seed=seed)`."""
    model = tiny_moe()
    with r3.record(model) as recorder:
        run(model, seed)
    return recorder.expert_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_inside_one_another_with_and_without_margins(name):
    case = CASES[name]
    model, first, second = case.build(), case.inputs(seed=0), case.inputs(seed=1)
    classes = [type(module) for module in model.modules()]
    wanted = []
    for inputs in (first, second):
        with torch.no_grad(), r3.record(model, margins=True) as single:
            model(**inputs)
        wanted.append(single)
    with torch.no_grad(), r3.record(model) as outer:
        model(**first)
        assert torch.equal(outer.expert_ids, wanted[0].expert_ids)
        with r3.record(model, margins=True) as inner, r3.record(model) as innermost:
            model(**second)
        for recorder in (outer, inner, innermost):
            assert torch.equal(recorder.expert_ids, wanted[1].expert_ids)
        assert torch.equal(inner.margins, wanted[1].margins)
        with pytest.raises(r3.ReplayError, match="no margins were recorded"):
            _ = outer.margins
        model(**first)
    assert torch.equal(outer.expert_ids, wanted[0].expert_ids)
    assert torch.equal(inner.expert_ids, wanted[1].expert_ids)
    assert [type(module) for module in model.modules()] == classes


def test_one_of_the_whole_and_one_of_the_inner_model():
    model = tiny_moe()
    with r3.record(model) as whole, r3.record(model.model, margins=True) as inner:
        run(model)
        assert torch.equal(whole.expert_ids, alone(0))
        assert torch.equal(inner.expert_ids, alone(0))
        with torch.no_grad():
            model.model(input_ids=tokens(seed=1), use_cache=False)
    assert torch.equal(whole.expert_ids, alone(0))
    assert torch.equal(inner.expert_ids, alone(1))
    assert inner.margins.shape == inner.expert_ids.shape[:3]


def test_replay_attached_and_detached_inside():
    model, routing = tiny_moe(), random_ids(seed=5)
    with r3.record(model) as outer:
        replay = r3.attach(model)
        with r3.record(model, margins=True) as inner:
            run(model, routed_experts=routing)
        with pytest.raises(r3.ReplayError, match="expected a live forward, got a replayed one"):
            _ = inner.margins
        replay.detach()
        assert torch.equal(inner.expert_ids.long(), routing)
        assert torch.equal(outer.expert_ids.long(), routing)
        run(model, 1)
    assert torch.equal(outer.expert_ids, alone(1))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_is_not_recorded_and_the_next_one_is(error):
    model = tiny_moe()

    def fail(*_):
        raise error

    with r3.record(model) as outer:
        run(model)
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with r3.record(model, margins=True) as inner, pytest.raises(error):
            run(model, 1)
        hook.remove()
        with pytest.raises(r3.ReplayError, match="nothing recorded"):
            _ = inner.routing
        assert torch.equal(outer.expert_ids, alone(0))
        run(model, 2)
        assert torch.equal(outer.expert_ids, alone(2))
        with r3.record(model, margins=True) as inner:
            run(model, 3)
    assert torch.equal(outer.expert_ids, alone(3))
    assert torch.equal(inner.expert_ids, alone(3))


def test_threads_record_their_own_forwards():
    model, barrier, wrong = tiny_moe(), threading.Barrier(3), []
    wanted = [alone(seed) for seed in range(3)]

    def work(seed):
        with r3.record(model) as outer, r3.record(model, margins=True) as inner:
            barrier.wait()
            run(model, seed)
            barrier.wait()
        wrong.extend(seed for recorder in (outer, inner) if not torch.equal(recorder.expert_ids, wanted[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    with r3.record(model) as bystander:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not wrong
    with pytest.raises(r3.ReplayError, match=r"nothing recorded.*in the thread that opened it"):
        _ = bystander.routing


def test_one_recorder_is_open_once_at_a_time():
    model = tiny_moe()
    recorder = r3.record(model)
    with recorder:
        with pytest.raises(r3.ReplayError, match="open already"), recorder:
            pass
        run(model)
    assert torch.equal(recorder.expert_ids, alone(0))
    with recorder:
        run(model, 1)
    assert torch.equal(recorder.expert_ids, alone(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_router_that_chooses_twice_in_a_forward_is_not_recorded():
    """Routing has one column for a layer: the last pass of a layer alone would look like all of it."""
    model = tiny_moe()
    layer = model.model.layers[1]
    once = layer.forward

    def twice(hidden, *args, **kwargs):
        return once(once(hidden, *args, **kwargs), *args, **kwargs)

    with r3.record(model) as recorder:
        layer.forward = twice
        with pytest.raises(r3.ReplayError, match=r"layers\.1\.mlp\.gate chose twice in one forward"):
            run(model)
        layer.forward = once
        run(model)
    assert torch.equal(recorder.expert_ids, alone(0))
