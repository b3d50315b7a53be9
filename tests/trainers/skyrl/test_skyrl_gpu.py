"""SkyRL's FSDP strategy and its Ulysses with FlashAttention, on GPUs: nothing of SkyRL is replaced but Ray."""

import contextlib

import pytest
import torch
from gpu_jobs import FLASH, FLOAT32, policy
from ranks import Ranks
from rollouts import of_samples, oracle, plain_logprobs, scored, settings, training_batch
from trainers.conformance import check_replayed, furthest

LIMIT = 1e-4  # nats, float32 on a GPU
COUNTS = [pytest.param(count, marks=pytest.mark.gpu(count=count)) for count in (1, 2)]


@pytest.fixture(scope="module", params=COUNTS)
def ranks(request):
    with contextlib.closing(Ranks(request.param, "cuda")) as ranks:
        ranks.size = request.param
        yield ranks


@pytest.fixture(scope="module")
def plain():
    plain = oracle()
    plain.model.cuda()
    return plain


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
    forwards = scored(plain, old, trained)
    print(ranks.size, "ranks", forwards, norm)
    check_replayed(forwards, LIMIT)
    assert norm > 0
    assert 0 < furthest(after, old) < 1, "a step was made"


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "Ulysses"])
def test_packed_rows_in_flash_attention(ranks, plain, sliced):
    """In bfloat16, as SkyRL trains."""
    pytest.importorskip("flash_attn")
    if sliced and ranks.size == 1:
        pytest.skip("one rank has nobody to share tokens with")
    old, trained, norm, _ = results(ranks, 2 if sliced else 1, FLASH, False)
    with torch.no_grad():
        sides = [[part.cpu() for part in plain_logprobs(plain, replayed=on)] for on in (True, False)]
    from_replayed, from_live = (
        torch.cat([(a - b).abs() for a, b in zip(old, side, strict=True)]).mean().item() for side in sides
    )
    forwards = scored(plain, old, trained)
    print(ranks.size, "ranks, sliced", sliced, from_replayed, from_live, forwards, norm)
    assert from_replayed < from_live / 10
    assert max(each.replayed for each in forwards) < 0.5
    assert norm > 0
