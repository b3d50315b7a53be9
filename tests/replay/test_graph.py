"""Marks in an autograd graph: which nodes get them, and which of them a repeated part of a layer finds."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from r3.replay.graph import UNMARKED, evaluated_node, mark_inputs, mark_outputs, nearest_mark, packs_for_repeat

KEY = "layer"


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(*shape or (2,), requires_grad=True)


def test_inputs_are_marked_wherever_they_stand():
    one, two, plain = leaf() * 2, leaf() * 3, torch.ones(2)
    args, kwargs, marked = mark_inputs((one, plain, 7), {"mask": None, "hidden": two}, KEY, "call")
    assert marked is True
    assert args == (one, plain, 7)
    assert kwargs == {"mask": None, "hidden": two}
    assert [nearest_mark(tensor.grad_fn, KEY) for tensor in (one, two)] == ["call", "call"]
    assert nearest_mark(one.grad_fn, "another key") is UNMARKED


def test_without_a_gradient_nothing_is_marked():
    plain = torch.ones(2)
    assert mark_inputs((plain, None), {"hidden": plain}, KEY, "call") == ((plain, None), {"hidden": plain}, False)


def test_a_leaf_and_an_input_of_two_forwards_have_a_node_for_each():
    weight, shared = leaf(), leaf() * 2
    for source in (weight, shared):
        found = [mark_inputs((source,), {}, KEY, call)[0][0] for call in ("first", "second", "first")]
        assert [nearest_mark(tensor.grad_fn, KEY) for tensor in found] == ["first", "second", "first"]
        torch.stack(found).sum().backward()
    assert weight.grad.tolist() == [3.0, 3.0]
    # Where the node is free, or has the same mark, it is left as it is.
    free = leaf() * 2
    again = mark_inputs(mark_inputs((free,), {}, KEY, "call")[0], {}, KEY, "call")[0][0]
    assert again is free


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: a + b,
        lambda a, b: (a, b),
        lambda a, b: [None, (a, [b])],
        lambda a, b: {"logits": a, "losses": {"aux": b}},
    ],
    ids=["tensor", "tuple", "nested", "dicts"],
)
def test_outputs_are_marked_down_to_what_is_marked(form):
    weight = leaf()
    source = leaf() * 1
    mark_inputs((source,), {}, KEY, "earlier")
    inner = source * weight
    top, other = inner.exp(), inner.sin()
    mark_outputs(form(top, other), KEY, "call")
    assert [nearest_mark(t.grad_fn, KEY) for t in (top, other, inner)] == ["call"] * 3
    assert nearest_mark(source.grad_fn, KEY) == "earlier"
    # The weight's own node belongs to every forward.
    assert nearest_mark((weight * 2).grad_fn, KEY) is UNMARKED


def test_the_node_that_is_evaluated_is_known_in_a_backward_pass_alone():
    seen = []
    source = leaf()
    top = source.exp()
    top.register_hook(lambda gradient: seen.append(evaluated_node()))
    (top * 2).sum().backward()
    assert len(seen) == 1
    assert seen[0] is not None
    assert evaluated_node() is None


def test_code_that_will_be_repeated_is_known():
    assert not packs_for_repeat()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert packs_for_repeat()
    assert not packs_for_repeat()
