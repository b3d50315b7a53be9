"""SkyRL's FSDP strategy and its Ulysses with FlashAttention, on GPUs: nothing of SkyRL is replaced but Ray."""

import contextlib

import pytest
import torch
from gpu_jobs import FLASH, FLOAT32, policy
from ranks import Ranks
from rollouts import farthest, of_samples, plain_logprobs, plain_model, settings, training_batch

LIMIT = 1e-4  # nats, float32 on a GPU
COUNTS = [pytest.param(count, marks=pytest.mark.gpu(count=count)) for count in (1, 2)]


@pytest.fixture(scope="module", params=COUNTS)
def ranks(request):
    with contextlib.closing(Ranks(request.param, "cuda")) as ranks:
        ranks.size = request.param
        yield ranks


@pytest.fixture(scope="module")
def plain():
    """Replayed and live log-probabilities of each sample."""
    model = plain_model().cuda()
    with torch.no_grad():
        return [[part.cpu() for part in plain_logprobs(model, replayed=on)] for on in (True, False)]


def results(ranks, sequence_size, more, exact):
    """As `gpu_jobs.policy`, of the samples of all ranks."""
    batch = training_batch(settings())
    each = ranks.all(policy, sequence_size, more, exact, timeout_s=280)[::sequence_size]
    old, trained, after = ([row for part in each for row in part[at]] for at in (0, 1, 3))
    trained = [torch.tensor(row) for row in trained][:6]
    assert len({part[2] for part in each}) == 1
    return of_samples(batch, torch.tensor(old)), trained, each[0][2], of_samples(batch, torch.tensor(after))


def test_a_sharded_policy_replays(ranks, plain):
    old, trained, norm, after = results(ranks, 1, FLOAT32, True)
    print(ranks.size, "ranks", farthest(old, plain[0]), farthest(trained, plain[0]), norm, farthest(after, plain[0]))
    assert farthest(old, plain[0]) < LIMIT
    assert farthest(trained, plain[0]) < LIMIT
    assert farthest(old, plain[1]) > 1
    assert norm > 0
    assert 0 < farthest(after, plain[0]) < 1, "a step was made"


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "Ulysses"])
def test_packed_rows_in_flash_attention(ranks, plain, sliced):
    """In bfloat16, as SkyRL trains."""
    pytest.importorskip("flash_attn")
    if sliced and ranks.size == 1:
        pytest.skip("one rank has nobody to share tokens with")
    old, trained, norm, _ = results(ranks, 2 if sliced else 1, FLASH, False)
    from_replayed, from_live = (
        torch.cat([(a - b).abs() for a, b in zip(old, side, strict=True)]).mean().item() for side in plain
    )
    print(ranks.size, "ranks, sliced", sliced, from_replayed, from_live, farthest(old, plain[0]), norm)
    assert from_replayed < from_live / 10
    assert farthest(old, plain[0]) < 0.5
    assert farthest(trained, plain[0]) < 0.5
    assert norm > 0
