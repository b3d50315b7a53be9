"""Two ranks: FSDP as SkyRL shards a model, with the second rank's made on meta, and Ulysses slices."""

import pytest
import rank_jobs
import torch
from ranks import Ranks
from rollouts import farthest, of_samples, plain_logprobs, plain_model, settings, training_batch


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def replayed():
    with torch.no_grad():
        return plain_logprobs(plain_model())


def test_a_sharded_policy_replays(ranks, replayed):
    results = ranks.all(rank_jobs.sharded, timeout_s=280)
    batch = training_batch(settings())
    old = of_samples(batch, torch.tensor([row for rows, *_ in results for row in rows]))
    assert farthest(old, replayed) < 1e-5
    trained = [torch.tensor(row) for _, rows, *_ in results for row in rows][: len(replayed)]
    assert farthest(trained, replayed) < 1e-5
    (_, _, norm, wrapped, _), (_, _, other, _, _) = results
    assert norm == other > 0
    assert wrapped >= 9, "each layer, and the model"
    after = of_samples(batch, torch.tensor([row for *_, rows in results for row in rows]))
    assert 0 < farthest(after, replayed) < 1, "a step was made"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_slices_of_rows_go_with_slices_of_tokens(ranks, replayed, packed):
    for old, trained in ranks.all(rank_jobs.sliced, packed, timeout_s=280):
        assert farthest(old, replayed) < 1e-5
        assert farthest(trained, replayed) < 1e-5
