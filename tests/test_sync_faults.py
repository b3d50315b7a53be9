"""Faults in the middle of weight syncs, with a real server of two workers and senders that are processes.

A part of what `python tests/faults.py` runs, by fixed seeds: each fault there is, most of them once.
"""

import pytest
from fault_harness import Harness
from faults import CALL, CONTENT, FILE, KINDS, TENSOR, Fault, killed, schedule

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SEEDS = ()


@pytest.fixture(scope="module")
def harness():
    with Harness() as made:
        yield made
    assert not made.leaked


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sync_with_faults_commits_everywhere_or_is_known_to_have_failed(harness, seed):
    outcome = harness.run(schedule(seed))
    assert not outcome.violations, f"{schedule(seed)}\n{outcome}"
    assert outcome.reached


def test_a_worker_that_died_ends_the_sync_and_its_engine_started_again_joins_at_the_next(harness):
    outcome = harness.run(killed(0))
    assert not outcome.violations, f"{killed(0)}\n{outcome}"
    assert outcome.kind == "restarted"


def test_the_seeds_cover_every_kind_of_fault():
    found = {fault.kind for seed in SEEDS for fault in schedule(seed).faults}
    assert found == KINDS.keys() - {"none"}


def test_schedules_are_the_same_every_time_and_every_fault_there_is_comes_in_300():
    assert [str(schedule(seed)) for seed in range(50)] == [str(schedule(seed)) for seed in range(50)]
    faults: list[Fault] = [fault for seed in range(300) for fault in schedule(seed).faults]
    assert {fault.kind for fault in faults} == KINDS.keys() - {"none"}
    for kind, ways in (("transit", TENSOR), ("file", FILE), ("content", CONTENT), ("call", CALL)):
        assert {fault.how for fault in faults if fault.kind == kind} == set(ways), kind
