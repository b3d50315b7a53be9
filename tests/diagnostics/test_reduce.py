"""Sums and sequence totals over two ranks; what is wrong on one of them stops both."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from r3.diagnostics import CoverageSums, LogprobSums, RoutingSums, SequenceSums, sequence_totals
from r3.diagnostics.corrections import gspo, truncated_importance
from r3.diagnostics.merging import collective_device, same_on_all_ranks
from r3.errors import DiagnosticsError


@pytest.fixture(scope="module")
def ranks():
    with contextlib.closing(Ranks(2, here=True)) as pair:
        yield pair


def test_reduce_is_local_without_a_process_group():
    sums = LogprobSums.from_tensors(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3) > 0)
    assert sums.reduce() == sums


def test_sums_add_up_with_their_kind_and_with_the_zero_of_sum_alone():
    a, b = SequenceSums(sequences=1, chi2_sum=2.0), SequenceSums(sequences=3, chi2_sum=4.0)
    assert sum([a, b]) == a + b == 0 + a + b == SequenceSums(sequences=4, chi2_sum=6.0)
    for wrong in (lambda: a + 0, lambda: a + None, lambda: 1 + a, lambda: 0.0 + a, lambda: None + a):
        with pytest.raises(TypeError):
            wrong()
    assert a != b
    assert LogprobSums.empty() != LogprobSums.empty(extreme_ratio=3.0)
    assert (a == 1, a == CoverageSums.empty()) == (False, False)


def reduce_sums():
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    train, rollout = (-torch.rand(5 + rank, generator=generator) for _ in range(2))
    mine = LogprobSums.from_tensors(train, rollout, torch.ones(5 + rank, dtype=torch.bool))
    empty_here = mine if rank else LogprobSums.empty()
    ids = torch.rand(4, 3, 6, generator=generator).topk(2).indices
    routing = RoutingSums.from_tensors(ids, ids.roll(1, 0), torch.ones(4, dtype=torch.bool))
    errors = []
    # The second pair has totals of different lengths, which no all-reduce could have told.
    kinds = LogprobSums.empty(extreme_ratio=2.0 + rank), RoutingSums.empty(layer_ids=range(1 + rank), slots=2)
    # Nothing but their classes tells these apart.
    for uneven in (*kinds, (CoverageSums, SequenceSums)[rank].empty()):
        with pytest.raises(DiagnosticsError) as caught:
            uneven.reduce()
        errors.append(str(caught.value))
    reduced = (mine.reduce(), empty_here.reduce(dist.group.WORLD), routing.reduce())
    return mine, routing, reduced, errors


def test_sums_of_two_ranks_are_added_and_uneven_ones_refused(ranks):
    (a, routing_a, reduced_a, errors_a), (b, routing_b, reduced_b, errors_b) = ranks.all(reduce_sums)
    assert reduced_a == reduced_b == (a + b, b, routing_a + routing_b)
    assert reduced_a[0].abs_max == max(a.abs_max, b.abs_max)
    for rank, errors in enumerate((errors_a, errors_b)):
        expected = "LogprobSums", "RoutingSums", ("CoverageSums", "SequenceSums")[rank]
        assert all(f"rank {rank} has {kind}" in error for kind, error in zip(expected, errors, strict=True))


def reduce_each_in_a_group_of_its_own():
    """The ranks hold what differs in kind, number and value: a collective of the default group would refuse it."""
    rank = dist.get_rank()
    alone = [dist.new_group([other]) for other in range(2)][rank]
    routing = RoutingSums.empty(layer_ids=range(1 + rank), slots=2)
    values = torch.full((1 + rank, 3), -1.0)
    mask, ids = values < 0, torch.arange(1 + rank)[:, None].expand(-1, 3)
    sums, tokens = sequence_totals(values, mask, ids, 1 + rank, alone)
    with pytest.raises(DiagnosticsError, match="expected finite" if rank else "count: expected 0 or more"):
        sequence_totals(values / 0 if rank else values, mask, ids, 2 if rank else -1, alone)
    # What is wrong on one rank is no business of the other's group.
    with pytest.raises(DiagnosticsError, match="expected finite") if rank else contextlib.nullcontext():
        sequence_totals(values / 0 if rank else values, mask, ids, 1 + rank, alone)
    weighted = gspo(values, values - 0.5, mask, group=alone)
    return routing.reduce(alone) == routing, sums.tolist(), tokens.tolist(), weighted.sums.sequences


def test_a_group_is_asked_in_place_of_all_ranks(ranks):
    found = ranks.all(reduce_each_in_a_group_of_its_own)
    assert found == [(True, [-3.0] * n, [3.0] * n, n) for n in (1, 2)]


def agree():
    rank = dist.get_rank()
    sums = truncated_importance(
        *[torch.full((2, 3), -1.0)] * 2, torch.ones(2, 3) > 0, level="sequence", group=dist.group.WORLD
    )
    return (
        [same_on_all_ranks(value, None) for value in (0.5, -3.0, 1.0 + rank, -1.0 - rank, 1 + rank * 1e-12)],
        collective_device(None),
        sums.sums.sequences,
    )


def test_ranks_agree_on_equal_values_only(ranks):
    found = ranks.all(agree)
    assert [each[:2] for each in found] == [([True, True, False, False, False], torch.device("cpu"))] * 2
    # Sequences that are spread over ranks count once, on the first.
    assert [each[2] for each in found] == [2, 0]


def half(rank):
    generator = torch.Generator().manual_seed(0)
    values, ids = torch.randn(2, 10, generator=generator), torch.randint(3, (2, 10), generator=generator)
    return values[:, rank * 5 :][:, :5], torch.ones(2, 5, dtype=torch.bool), ids[:, rank * 5 :][:, :5]


def reduce_sequences():
    rank = dist.get_rank()
    values, mask, ids = half(rank)
    totals = sequence_totals(values, mask, ids, 3, dist.group.WORLD)
    errors = []
    for case in ((values, mask, ids, 3 + rank), (values / (1 - rank), mask, ids, 3), (values, mask[rank], ids, 3)):
        with pytest.raises(DiagnosticsError) as caught:
            sequence_totals(*case, dist.group.WORLD)
        errors.append(str(caught.value))
    again = sequence_totals(values, mask, ids, 3, dist.group.WORLD)
    reduced = SequenceSums.from_totals(*sequence_totals(values, mask, ids, 3)).reduce()
    return totals, again, errors, reduced


def test_sequences_spread_over_two_ranks_and_an_error_on_one_of_them(ranks):
    found = ranks.all(reduce_sequences)
    whole = [torch.cat(halves, 1) for halves in zip(half(0), half(1), strict=True)]
    expected = sequence_totals(*whole, 3)
    halves = [SequenceSums.from_totals(*sequence_totals(*half(rank), 3)) for rank in range(2)]
    for totals, again, errors, reduced in found:
        torch.testing.assert_close(totals[0], expected[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(totals[1], expected[1])
        assert torch.equal(again[0], totals[0])
        assert "count: expected the same on all ranks" in errors[0]
        assert reduced == halves[0] + halves[1]
    assert "another rank" in found[0][2][1]
    assert "got 10 of 10" in found[1][2][1]
