"""Rows in the layouts and with the marks of trainers: `routing_of`, and `cat` where prompts are padded on the left."""

import pytest
import torch
from torch.nested import as_nested_tensor

from r3 import RoutingError
from r3.routing import RolloutRouting, RoutingSpec, routing_of

# Layer 0 is dense; 300 experts do not fit uint8.
SPEC = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=300, top_k=2)
SMALL = RoutingSpec(layer_ids=(1, 2), num_layers=3, num_experts=256, top_k=2)


def rows(tokens: int, spec: RoutingSpec = SPEC, seed: int = 0) -> torch.Tensor:
    """int64 `[T, 3, K]` of all decoder layers, the dense one filled with zeros as vLLM does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, 3, spec.num_experts, generator=generator).topk(spec.top_k, dim=-1).indices
    ids[:, 0] = 0
    return ids


def test_zeros_and_repeats_in_all_layers_are_missing_rows():
    ids = rows(6)
    ids[2] = 0
    ids[4] = torch.tensor([[7, 7], [9, 9], [3, 3]])
    found = routing_of(SPEC, ids.to(torch.int16), repeats_are_missing=True)
    assert found.layer_ids == (1, 2)
    assert found.valid.tolist() == [[True, True, False, True, False, True]]
    assert torch.equal(found.expert_ids[0, found.valid[0]].long(), ids[:, 1:][found.valid[0]])


def test_a_row_that_repeats_in_one_layer_only_is_damaged():
    ids = rows(4)
    ids[1, 2] = 5
    with pytest.raises(RoutingError, match="not 2 distinct"):
        routing_of(SPEC, ids, repeats_are_missing=True)


def test_expert_255_is_no_mark_and_a_filling_of_255_is():
    ids = rows(3, SMALL).to(torch.uint8)
    ids[0, 1] = torch.tensor([255, 3])
    ids[2] = 255
    found = routing_of(SMALL, ids, repeats_are_missing=True)
    assert found.valid.tolist() == [[True, True, False]]
    assert found.expert_ids[0, 0, 0].tolist() == [255, 3]
    with pytest.raises(RoutingError, match="not 2 distinct"):
        routing_of(SMALL, ids)  # unsigned: every row counts


def test_a_mask_says_what_is_missing_whatever_the_ids_are():
    """SkyRL 0.4 fills with the distinct ids 0 to K - 1, which look valid."""
    ids = rows(5)
    ids[3:] = torch.arange(2)
    mask = torch.tensor([True, True, True, False, False])
    found = routing_of(SPEC, ids, valid=mask)
    assert found.valid.tolist() == [mask.tolist()]
    assert not found.expert_ids[0, 3:].any()
    assert torch.equal(routing_of(SPEC, ids[None], valid=mask[None]).valid, found.valid)


@pytest.mark.parametrize("marked", [{"repeats_are_missing": True}, {}])
def test_jagged_rows_are_one_packed_row(marked):
    parts = [rows(3), rows(5, seed=1)]
    if marked:
        parts[1][-1] = 0
    else:
        parts[1][-1] = -1
    found = routing_of(SPEC, as_nested_tensor(parts, layout=torch.jagged), **marked)
    assert found.shape == (1, 8, 2, 2)
    assert found.valid.tolist() == [[True] * 7 + [False]]


def test_minus_one_marks_layers_of_a_row_too():
    ids = rows(2)[:, 1:]
    ids[0, 1] = -1
    found = routing_of(SPEC, ids)
    assert found.validity.tolist() == [[[True, False], [True, True]]]


def test_repeats_need_not_stand_side_by_side():
    spec = RoutingSpec(layer_ids=(0, 1), num_layers=2, num_experts=10, top_k=3)
    ids = torch.tensor([[[5, 3, 5], [9, 1, 9]], [[5, 3, 4], [9, 1, 2]], [[1, 5, 5], [7, 7, 2]]])
    assert routing_of(spec, ids, repeats_are_missing=True).valid.tolist() == [[False, True, False]]


def test_one_mask_of_packed_rows_in_each_of_its_forms():
    ids = rows(5)
    mask = torch.tensor([True, False, True, True, False])
    jagged = as_nested_tensor([mask[:2], mask[2:]], layout=torch.jagged)
    for packed in (ids, as_nested_tensor([ids[:2], ids[2:]], layout=torch.jagged)):
        for given in (mask, mask[None], jagged):
            found = routing_of(SPEC, packed, valid=given)
            assert found.valid.tolist() == [mask.tolist()]
            assert torch.equal(found.expert_ids[0, mask].long(), ids[mask, 1:])


def test_one_slot_cannot_repeat():
    top1 = RoutingSpec(layer_ids=(0,), num_layers=1, num_experts=4, top_k=1)
    ids = torch.zeros(2, 1, 1, dtype=torch.int64)
    with pytest.raises(RoutingError, match=r"top_k = 1.*Give `valid`"):
        routing_of(top1, ids, repeats_are_missing=True)
    assert routing_of(top1, ids, valid=torch.tensor([True, False])).rows_valid == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 2, 5, 2), "L = 2 layers.*all 3 decoder layers"), ((2, 2, 2, 3), "K = 2"), ((4, 2), r"got \(4, 2\)")],
)
def test_other_shapes_are_refused(shape, message):
    with pytest.raises(RoutingError, match=message):
        routing_of(SPEC, torch.zeros(shape, dtype=torch.int64))


def test_a_mask_and_repeats_together_are_refused():
    with pytest.raises(RoutingError, match="got both"):
        routing_of(SPEC, rows(2), valid=torch.ones(2, dtype=torch.bool), repeats_are_missing=True)


def test_parts_begin_where_they_are_told():
    """Prompts padded on the left: the longest begins at 0."""
    parts = [routing_of(SPEC, rows(3)), routing_of(SPEC, rows(5, seed=1))]
    found = RolloutRouting.cat(parts, starts=[2, 0], length=6)
    assert found.valid.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert torch.equal(found.expert_ids[0, 2:5], parts[0].expert_ids[0])
    assert torch.equal(found.expert_ids[1, :5], parts[1].expert_ids[0])
    assert not found.expert_ids[~found.valid].any()
    alone = RolloutRouting.cat(parts[:1], starts=[1])
    assert alone.valid.int().tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("starts", [[0], [0, -1]])
def test_starts_that_fit_no_part_are_refused(starts):
    with pytest.raises(RoutingError, match="starts: expected 2 positions from 0 up"):
        RolloutRouting.cat([routing_of(SPEC, rows(3))] * 2, starts=starts)


def test_a_part_that_ends_after_the_batch_is_refused():
    with pytest.raises(RoutingError, match="at least 5, where the longest part ends"):
        RolloutRouting.cat([routing_of(SPEC, rows(3))] * 2, starts=[2, 0], length=4)
