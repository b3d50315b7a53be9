"""Padding of a replayed forward is spread over the experts; all other rows, and what they learn, are as they were."""

import importlib

import pytest
import torch
from zoo import CASES

import r3
from r3.replay.padding import padding_rows
from r3.routing import Packing

LENGTHS, WIDTH = torch.tensor([10, 4, 7]), 10
MASK = torch.arange(WIDTH) < LENGTHS[:, None]


def forward(case, layout, by_layer):
    """Model after a replayed forward and backward, and what it chose `[B, S, L, K]`; of every third row live."""
    model = case.build().train()
    replay = r3.attach(model)
    generator = torch.Generator().manual_seed(2)
    layers = len(case.router_layers)
    ids = torch.rand(3, WIDTH, layers, case.num_experts, generator=generator).argsort(-1)[..., : case.top_k]
    valid = MASK & (torch.arange(WIDTH) % 3 != 2)
    if by_layer:
        valid = valid[..., None] & (torch.rand(3, WIDTH, layers, generator=generator) < 0.8)
    routing = r3.RolloutRouting(ids, valid, replay.spec.layer_ids, case.num_experts)
    tokens = torch.randint(1, 60, (3, WIDTH), generator=generator) * MASK
    packing = Packing.from_mask(MASK, row_length=12)
    if layout == "mask":
        inputs = {"input_ids": tokens, "attention_mask": MASK.long(), "routed_experts": routing}
    elif layout == "positions":
        positions = (MASK.cumsum(1) - 1).clamp(min=0) * MASK
        inputs = {"input_ids": tokens, "position_ids": positions, "routed_experts": routing}
    else:
        routing = routing.pack(packing)
        inputs = {"input_ids": packing.pack(tokens), "position_ids": packing.position_ids(), "routed_experts": routing}
    with r3.record(model) as recorder:
        logits = model(**inputs, use_cache=False).logits
    chosen = recorder.expert_ids
    real = MASK
    if layout == "packed":
        logits, real = packing.unpack(logits), packing.pack(MASK)
    (logits * MASK[..., None]).square().mean().backward()
    return model, logits.detach(), chosen, real, replay.last


@pytest.mark.parametrize("by_layer", [False, True], ids=["rows", "layers"])
@pytest.mark.parametrize("layout", ["mask", "positions", "packed"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_padding_goes_to_all_experts_and_no_other_row_changes(name, layout, by_layer, monkeypatch):
    case = CASES[name]
    model, logits, chosen, real, report = forward(case, layout, by_layer)
    monkeypatch.setattr(importlib.import_module("r3.replay.attach"), "padding_rows", lambda kwargs, shape: None)
    plain, expected, before, _, report_before = forward(case, layout, by_layer)
    assert report == report_before
    assert torch.equal(chosen[real], before[real])
    torch.testing.assert_close(logits[MASK], expected[MASK])
    for (parameter_name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=parameter_name)
    for layer in range(chosen.shape[2]):
        spread, piled = (
            ids[..., layer, :][~real].flatten().bincount(minlength=case.num_experts).max() for ids in (chosen, before)
        )
        even = int((~real).sum()) * case.top_k / case.num_experts
        # One row without a mask may begin a sequence of the next slice, and is live.
        assert spread <= even + 1 + (0 if layout == "mask" else len(real)) < piled or layout == "packed"


def test_what_is_taken_for_padding():
    shape = (1, 6)

    def rows(**kwargs):
        found = padding_rows({name: torch.tensor([value]) for name, value in kwargs.items()}, shape)
        return None if found is None else found[0].tolist()

    assert rows(attention_mask=[0, 0, 1, 1, 1, 0]) == [True, True, False, False, False, True]
    assert rows(position_ids=[0, 1, 2, 0, 0, 0]) == [False, False, False, True, True, False]
    assert rows(position_ids=[0, 1, 2, 3, 4, 0]) == [False] * 6, "the first token of a sequence of the next slice"
    assert rows(position_ids=[0, 0, 1, 2, 0, 1]) == [False] * 6, "a sequence of one token"
    assert rows(attention_mask=[1] * 6, position_ids=[0, 0, 0, 0, 0, 0]) == [False] * 6
    assert rows() is None
    assert padding_rows({"attention_mask": torch.zeros(1, 1, 6, 6)}, shape) is None
    assert padding_rows({"attention_mask": torch.ones(1, 9, dtype=torch.int64)}, shape) is None
