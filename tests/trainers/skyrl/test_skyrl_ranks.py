"""Two ranks: FSDP as SkyRL shards a model, with the second rank's made on meta, and Ulysses slices."""

import pytest
import rank_jobs
import torch
from ranks import Ranks
from rollouts import of_samples, oracle, scored, settings, training_batch
from trainers.conformance import check_replayed, furthest


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def plain():
    return oracle()


def test_a_sharded_policy_replays(ranks, plain):
    results = ranks.all(rank_jobs.sharded, timeout_s=280)
    batch = training_batch(settings())
    old = of_samples(batch, torch.tensor([row for rows, *_ in results for row in rows]))
    trained = [torch.tensor(row) for _, rows, *_ in results for row in rows][: len(old)]
    check_replayed(scored(plain, old, trained))
    (_, _, norm, wrapped, _), (_, _, other, _, _) = results
    assert norm == other > 0
    assert wrapped >= 9, "each layer, and the model"
    after = of_samples(batch, torch.tensor([row for *_, rows in results for row in rows]))
    assert 0 < furthest(after, old) < 1, "a step was made"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_slices_of_rows_go_with_slices_of_tokens(ranks, plain, packed):
    for old, trained in ranks.all(rank_jobs.sliced, packed, timeout_s=280):
        check_replayed(scored(plain, old, trained))
