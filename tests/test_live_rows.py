"""Which rows of a keyword are routed live: those that are marked as missing, and no others."""

import pytest
import torch
from models import LAYERS, tiny_moe, tokens

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
