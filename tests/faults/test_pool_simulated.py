"""A few of the schedules that `tests/faults/pool_simulated.py` runs by the hundred."""

import pytest
from pool_schedules import KINDS, pool_schedule
from pool_simulated import SimulatedHarness, simulated

SEEDS = (22, 41, 53)


@pytest.fixture(scope="module")
def harness():
    with SimulatedHarness() as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rollout_comes_once_and_every_sync_commits_or_is_named_and_healed(harness, seed):
    outcome = harness.run(simulated(seed))
    assert not outcome.violations, f"{simulated(seed)}\n{outcome}"


def test_schedules_are_the_same_every_time_and_every_fault_comes_in_100():
    assert [str(pool_schedule(seed)) for seed in range(50)] == [str(pool_schedule(seed)) for seed in range(50)]
    assert {pool_schedule(seed).fault.kind for seed in range(100)} == KINDS.keys()
