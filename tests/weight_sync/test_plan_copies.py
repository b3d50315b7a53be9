"""Copies of a load plan: many become few that do the same, and regions must be a partition."""

import math
import random

import pytest
import torch

from r3.weight_sync.worker.load_plan.plan import Copy, Region, coalesced, coverage_problem


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
