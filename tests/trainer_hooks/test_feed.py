"""`RoutingFeed`: routing for forwards that a trainer calls without a word of it."""

import copy

import pytest
import torch
from models import random_ids, tiny_moe, tokens

import r3
from trainer_hooks import RoutingFeed


@pytest.fixture
def fed():
    model = tiny_moe().train()
    replay = r3.attach(model)
    return model, replay, RoutingFeed(replay)


def logits(model, ids, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


def test_forwards_take_their_samples_in_order(fed):
    model, replay, feed = fed
    ids, routing = tokens(), replay.routing(random_ids())
    with torch.no_grad():
        whole = logits(model, ids, routed_experts=routing)
        with feed.rows(routing.select(slice(0, 1)), routing.select(slice(1, None))):
            parts = [logits(model, ids[:1]), *(logits(model, row[None]) for row in ids[1:])]
            assert replay.last.rows_replayed == ids.shape[1]
        live = logits(model, ids)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    assert torch.equal(live, logits(copy.deepcopy(model).eval(), ids))


def test_samples_that_no_forward_ran_are_an_error(fed):
    model, replay, feed = fed
    with (
        pytest.raises(r3.ReplayError, match=r"all 2 samples.*none of the last 1"),
        feed.rows(replay.routing(random_ids())),
    ):
        logits(model, tokens()[:1])


def test_a_forward_too_many_is_an_error(fed):
    model, replay, feed = fed
    with feed.rows(replay.routing(random_ids())):
        logits(model, tokens())
        with pytest.raises(r3.ReplayError, match="got 0 left"):
            logits(model, tokens()[:1])


def test_a_forward_of_another_length_is_an_error(fed):
    model, replay, feed = fed
    with pytest.raises(r3.RoutingError, match="input of"), feed.rows(replay.routing(random_ids())):
        logits(model, tokens()[:, :-1])


def test_an_error_inside_is_not_hidden_by_what_is_left(fed):
    _, replay, feed = fed
    with pytest.raises(ZeroDivisionError), feed.rows(replay.routing(random_ids())):
        raise ZeroDivisionError
    with pytest.raises(r3.ReplayError, match="inside another"), feed.rows(), feed.rows():
        pass


def test_a_training_forward_without_rows_is_an_error(fed):
    model, _, feed = fed
    with pytest.raises(r3.ReplayError, match="without routing"):
        logits(model, tokens())
    with torch.no_grad():
        logits(model, tokens())
    logits(model.eval(), tokens())
    feed.detach()
    logits(model.train(), tokens())
