"""Faults in the middle of weight syncs, with a real server of two workers and senders that are processes.

A part, by fixed seeds, of what `python tests/faults/schedules.py` runs: that has 300 schedules, and workers that are
killed and started again by a supervisor.
"""

import pytest
from fault_harness import Harness
from schedules import CALL, CONTENT, FILE, KINDS, TENSOR, Fault, schedule

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

SEEDS = (5, 35, 52, 56, 64, 78, 82, 88, 111)


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


def test_schedules_are_the_same_every_time_and_every_fault_there_is_comes_in_300():
    assert [str(schedule(seed)) for seed in range(50)] == [str(schedule(seed)) for seed in range(50)]
    faults: list[Fault] = [fault for seed in range(300) for fault in schedule(seed).faults]
    assert {fault.kind for fault in faults} == KINDS.keys() - {"none"}
    for kind, ways in (("transit", TENSOR), ("file", FILE), ("content", CONTENT), ("call", CALL)):
        assert {fault.how for fault in faults if fault.kind == kind} == set(ways), kind
