"""A few of the schedules that `tests/faults/pool_simulated.py --ranks` runs by the hundred."""

import pytest
from network_hosts import needs_hosts
from ranks_harness import RanksHarness
from ranks_schedules import CUT_KINDS, ENGINE_KINDS, RANK_KINDS, ranks_schedule

SEEDS = (12, 53)
LONG = (0, 10, 30)
CUTS = (31, 52)


@pytest.fixture(scope="module")
def harness():
    with RanksHarness() as made:
        yield made


@pytest.mark.parametrize(
    "seed",
    [
        *SEEDS,
        *(pytest.param(seed, marks=pytest.mark.long) for seed in LONG),
        *(pytest.param(seed, marks=[pytest.mark.long, needs_hosts]) for seed in CUTS),
    ],
)
def test_a_sync_commits_everywhere_or_is_an_error_on_every_rank_that_the_next_one_heals(harness, seed):
    outcome = harness.run(ranks_schedule(seed))
    assert not outcome.violations, f"{ranks_schedule(seed)}\n{outcome}"


def test_schedules_are_the_same_every_time_and_every_fault_comes_in_150():
    assert [str(ranks_schedule(seed)) for seed in range(50)] == [str(ranks_schedule(seed)) for seed in range(50)]
    faults = [ranks_schedule(seed).fault for seed in range(150)]
    for rank, kinds in ((None, ENGINE_KINDS), (0, RANK_KINDS), (1, RANK_KINDS)):
        assert {fault.kind for fault in faults if fault.rank == rank} == (kinds | CUT_KINDS).keys()
