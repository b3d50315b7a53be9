"""Syncs from several trainer ranks, whose shards are uneven or which share the experts, into a real engine."""

import contextlib

import pytest
import rank_worker_jobs as jobs
import torch
from ranks import Ranks
from sync_helpers import greedy

from r3.releases import gathers_split_parts, has_right_expert_parallelism
from r3.weight_sync import WeightSync

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_an_engine_says_what_the_weights_of_all_ranks_say(engine, weights, reference):
    with contextlib.closing(WeightSync(engine, dtype=torch.bfloat16, transport="files")) as plain:
        first = plain.push(weights.items(), version=(plain.version or 0) + 1)
    jobs.ENGINE.append(engine)
    ranks = Ranks(3, here=True)
    try:
        same, moved, back = [], [], []
        for said, scale in ((same, 1.0), (moved, 2.0), (back, 0.5)):
            receipt = ranks.all(jobs.into_engine, scale, timeout_s=240)[0]
            said += [receipt.digest, greedy(engine)]
        ranks.all(jobs.close_engine_sync)
    finally:
        ranks.close()
        jobs.ENGINE.clear()
    assert same[1] == back[1] == reference
    assert moved[1] != reference
    assert same[0] == back[0] != moved[0]
    assert receipt.bytes == first.bytes


@pytest.mark.skipif(not has_right_expert_parallelism(), reason="refused by name with this transformers")
@pytest.mark.skipif(not gathers_split_parts(), reason="this torch cannot gather adapters: refused by name")
def test_an_engine_says_what_the_adapted_experts_of_all_ranks_say(engine, reference):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with contextlib.closing(WeightSync(engine, dtype=torch.bfloat16, transport="files")) as plain:
        plain.push(jobs.demo(experts, spread=False), version=(plain.version or 0) + 1)
    adapted = greedy(engine)
    jobs.ENGINE.append(engine)
    ranks = Ranks(2, here=True)
    try:
        ranks.all(jobs.experts_into_engine, [], timeout_s=240)
        assert greedy(engine) == reference != adapted
        ranks.all(jobs.experts_into_engine, experts, timeout_s=240)
        assert greedy(engine) == adapted
        ranks.all(jobs.experts_into_engine, [], timeout_s=240)
        assert greedy(engine) == reference
        ranks.all(jobs.close_engine_sync)
    finally:
        ranks.close()
        jobs.ENGINE.clear()


def test_four_ranks_sync_into_four_workers_of_two_engines():
    """By r3's own worker extension, and vLLM's reload."""
    ranks = Ranks(4)
    try:
        assert ranks.all(jobs.into_extensions, timeout_s=240)[0] == 4
    finally:
        ranks.close()
