"""A sync to which every trainer rank sends its part: each weight is gathered to one rank, and all of them commit."""

import re
import socket

import pytest
import rank_sync_jobs as jobs
from ranks import Ranks

from r3.weight_sync.sender.deal import Dealt, deal
from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.sender.rank_link import Link

LIMIT_S = jobs.LIMIT_S


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def test_weights_are_dealt_evenly_and_what_is_made_together_stays_together():
    a, b = object(), object()
    sizes = [7, 1, 1, 9, 2, 2, 8, 3, 5, 4]
    weights = [Dealt(size, ()) for size in sizes]
    weights[1:3] = [Dealt(1, (a,)), Dealt(1, (a, b))]
    weights[4] = Dealt(2, (b,))
    for senders in (1, 2, 3, 4):
        shares = deal(weights, senders)
        assert sorted(number for share in shares for number in share) == list(range(10))
        assert all(share == sorted(share) for share in shares)
        assert any({1, 2, 4} <= {*share} for share in shares)
        loads = [sum(sizes[number] for number in share) for share in shares]
        assert max(loads) <= sum(sizes) / senders + 9
        assert deal(weights, senders) == shares
    assert deal([Dealt(5, ())], 3) == [[0], [], []]


def test_what_a_rank_holds_it_sends_and_the_rest_makes_up_for_it():
    held, free = object(), object()
    weights = [
        Dealt(6, (held,), (2,)),
        Dealt(1, (held,), (2,)),
        Dealt(4, (), (0, 2)),
        Dealt(4, (free,)),
        Dealt(3, (free,)),
    ]
    assert deal(weights, 3) == [[2], [3, 4], [0, 1]]
    assert deal([Dealt(1, (held,), (0,)), Dealt(1, (held,), (1,))], 2) in ([[0, 1], []], [[], [0, 1]]), (
        "in parts of two"
    )


@pytest.mark.parametrize(
    "kind",
    [
        "softmax",
        "softmax, fused",
        "softmax, tied",
        "softmax, replicated",
        "softmax, fp8",
        "softmax, lora",
        "biases",
        "gpt-oss",
    ],
)
def test_every_rank_sends_its_part_and_workers_hold_the_model(four, kind):
    found = four.all(jobs.synced, kind, timeout_s=100)
    sent = [rank["all"]["sent"] for rank in found]
    total = found[0]["all"]["bytes"]
    assert sum(sent) == total
    assert max(sent) <= max(1.05 * total / 4, total / 4 + found[0]["largest"])
    assert [rank["first"]["sent"] for rank in found] == [total, 0, 0, 0]
    assert found[0]["all"]["digest"] == found[0]["first"]["digest"] == found[0]["gathered"]


def test_a_weight_in_any_placement_goes_whole_to_its_owner_alone(four):
    four.all(jobs.placements)


def test_entries_that_some_ranks_hold_go_to_their_owner_alone_or_to_all(four):
    four.all(jobs.blocks)


@pytest.mark.parametrize(
    ("where", "what", "expected"),
    [
        (2, "raises", "rank 2: SyncError: .* could not be gathered: MemoryError: no memory"),
        (0, "raises", "rank 0: .* could not be gathered: MemoryError: no memory"),
        (3, "cannot send", "MemoryError: no memory|r3_load failed"),
        (1, "sends other bytes", "have come as they were sent"),
        (1, "has others", "rank 1: expected the weights of rank 0"),
        pytest.param(1, "sleeps", "rank 1 has not answered", marks=pytest.mark.long),
        pytest.param(2, "is late", r"rank 2 has not answered \(take part\)", marks=pytest.mark.long),
        (0, "is late", "rank 0, which drives the sync, has said nothing|has given up"),
    ],
)
def test_a_failure_of_any_rank_is_told_to_all_in_time_and_the_next_sync_heals(four, where, what, expected):
    found = four.all(jobs.failing, where, what, timeout_s=120)
    for rank, each in enumerate(found):
        assert re.search(expected, each["said"]), (rank, each)
        assert each["seconds"] < 4 * LIMIT_S, (rank, each)
    assert found[0]["untouched"]
    assert found[0]["healed"]


@pytest.mark.parametrize(
    ("where", "what"),
    [(3, "dies"), *(pytest.param(rank, "dies sending", marks=pytest.mark.long) for rank in (0, 1))],
)
def test_the_death_of_any_rank_ends_the_sync_on_all_others_and_nothing_is_committed(where, what):
    ranks = Ranks(4)
    try:
        found = ranks.run(jobs.failing, where, what, timeout_s=120)
    finally:
        ranks.close()
    assert isinstance(found[where], EOFError)
    for each in (each for rank, each in enumerate(found) if rank != where):
        assert f"rank {where} has ended" in each["said"], each
        assert each["seconds"] < 3 * LIMIT_S, each
    assert where == 0 or found[0]["untouched"]


@pytest.mark.parametrize("where", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_commit_that_not_all_ranks_know_of_is_an_error_on_all(four, where):
    """The engines hold the new version by then."""
    for rank, each in enumerate(found := four.all(jobs.failing, where, "is stopped at the end", timeout_s=120)):
        drives = where or not rank
        assert re.search("has committed on the engines, and not" if drives else "rank 0, which drives", each["said"])
    assert not found[0]["untouched"]
    assert found[0]["healed"]


def test_an_answer_that_comes_together_with_one_of_a_sync_before_is_taken():
    here, there = socket.socketpair()
    with here, there:
        for sync in (1, 1, 2):
            Link(there, 0).send({"sync": sync, "error": None}, 1.0)
        orders = Orders(0, [0, 1], {1: Link(here, 1)}, 2, 1.0, 1.0)
        try:
            assert orders.answers()[1]["sync"] == 2
        finally:
            orders.end(None)


@pytest.mark.long
def test_what_a_rank_gathers_after_the_others_gave_up_does_not_shift_the_next_sync(four):
    """Exchanges take all ranks, in one order."""
    for each in (found := four.all(jobs.failing, 0, "is stopped before it gathers", timeout_s=120)):
        assert re.search("rank 0, which drives the sync, has said nothing|has given up to wait", each["said"])
    assert found[0]["healed"]


def test_a_rank_that_dies_before_all_have_met_is_an_error_that_says_so():
    ranks = Ranks(2)
    try:
        found = ranks.run(jobs.meeting_without, 0, timeout_s=60)
    finally:
        ranks.close()
    assert isinstance(found[0], EOFError)
    assert str(found[1]).startswith("rank 1 waits for the first meeting of all ranks for a sync: ")


def test_no_rank_gathers_experts(four):
    """A layer's fused experts have 16 MiB. The first rank also holds the engine here."""
    mib = 1 << 20
    for found in four.all(jobs.memory)[1:]:
        assert found["parts"] <= 4 * 2 * mib, "of chunks, and no experts of others"
        assert found["gathered"] <= (4 + 4) * mib, "of one rank's experts at a time"


@pytest.mark.parametrize("kind", ["softmax", "softmax, replicated", "softmax, fp8"])
def test_every_rank_sends_the_experts_that_it_holds(four, kind):
    for made, others in four.all(jobs.exchanges, kind):
        assert 0 < made <= others, "weights of experts are gathered"
