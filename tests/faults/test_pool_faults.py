"""Faults in a pool of three real engines, a part by fixed seeds of what `tests/faults/pool_schedules.py` runs."""

import pytest
from pool_harness import PoolHarness
from pool_schedules import pool_schedule

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

SEEDS = (0, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def harness():
    with PoolHarness() as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rollout_comes_once_and_every_sync_commits_or_is_named_and_healed(harness, seed):
    outcome = harness.run(pool_schedule(seed))
    assert not outcome.violations, f"{pool_schedule(seed)}\n{outcome}"
