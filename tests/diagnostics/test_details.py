"""The tokens that a report shows: the same whatever the split, drawn evenly, and the worst ones by brute force."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks

from r3.diagnostics.chosen_tokens import priorities
from r3.diagnostics.details import TokenDetails
from r3.errors import DiagnosticsError

SAMPLES, LENGTH, LAYERS = 13, 37, 5


def step(seed=0, *, levels=None):
    """Tensors of one step, [SAMPLES, LENGTH]; with few `levels` of difference, most of them tie."""
    draw = torch.Generator().manual_seed(seed)
    shape = (SAMPLES, LENGTH)
    rollout = -torch.rand(shape, generator=draw) * 5
    live = torch.randn(shape, generator=draw) * 0.1
    replayed = torch.randn(shape, generator=draw) * 0.03
    if levels:
        rollout = rollout.round()
        live, replayed = (side.mul(levels * 20).round() / 8 for side in (live, replayed))
    return {
        "rollout": rollout,
        "mask": torch.rand(shape, generator=draw) < 0.7,
        "live": rollout + live,
        "replayed": rollout + replayed,
        "token_ids": torch.randint(1000, shape, generator=draw),
        "sample_ids": torch.arange(SAMPLES)[:, None].expand(shape),
        "positions": torch.arange(LENGTH).expand(shape),
        "parted": torch.rand(*shape, LAYERS, generator=draw) < 0.2,
    }


def details(tensors, keep=40, worst=7):
    return TokenDetails.from_tensors(**tensors, keep=keep, worst=worst)


def rows(tokens):
    columns = (tokens.sample, tokens.position, tokens.token_id, tokens.rollout, tokens.live, tokens.replayed)
    plain = [None if column is None else column.tolist() for column in columns]
    parted = [None] * len(tokens) if tokens.parted is None else tokens.parted.tolist()
    return [(*(column and column[row] for column in plain), parted[row]) for row in range(len(tokens))]


def everything(found):
    return rows(found.drawn), rows(found.furthest), found.tokens, found.left_out


def masked_in(tensors):
    """All tokens that count, as (sample, position, d), in plain Python."""
    side = tensors["live"] if tensors["replayed"] is None else tensors["replayed"]
    d = side.double() - tensors["rollout"].double()
    return [(b, t, d[b, t].item()) for b, t in tensors["mask"].nonzero().tolist()]


@given(seed=st.integers(0, 50), levels=st.sampled_from([None, 1]), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_split_gives_the_same_tokens(seed, levels, order):
    whole = step(seed, levels=levels)
    flat = {name: tensor.flatten(0, 1) for name, tensor in whole.items()}
    places = list(range(SAMPLES * LENGTH))
    order.shuffle(places)
    cuts = sorted(order.randrange(len(places) + 1) for _ in range(order.randrange(6)))
    pieces = [places[a:b] for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True)]
    parts = [details({name: tensor[piece] for name, tensor in flat.items()}) for piece in pieces]
    parts.insert(order.randrange(len(parts) + 1), TokenDetails.empty(keep=40, worst=7))
    assert everything(sum(parts)) == everything(details(whole)) == everything(details(flat))


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("replayed", [True, False])
def test_the_worst_are_those_of_a_full_sort(levels, replayed):
    tensors = step(3, levels=levels) | ({} if replayed else {"replayed": None})
    found = details(tensors)
    tokens = masked_in(tensors)
    hashes = dict(zip([t[:2] for t in tokens], priorities(*torch.tensor(tokens)[:, :2].long().T).tolist(), strict=True))
    expected = sorted(tokens, key=lambda token: (-abs(token[2]), hashes[token[:2]]))[:7]
    assert [row[:2] for row in rows(found.furthest)] == [token[:2] for token in expected]
    if levels:
        sizes = [abs(token[2]) for token in tokens]
        assert sizes.count(abs(expected[-1][2])) > 7, "no tie: this test says nothing of ties"
    drawn = sorted(tokens, key=lambda token: hashes[token[:2]])[:40]
    assert [row[:2] for row in rows(found.drawn)] == [token[:2] for token in drawn]


def test_the_columns_belong_together():
    tensors = step(1)
    found = details(tensors, keep=10_000)
    assert found.tokens == len(found.drawn) == int(tensors["mask"].sum())
    for b, t, token, rollout, live, replayed, parted in rows(found.drawn) + rows(found.furthest):
        assert tensors["mask"][b, t]
        assert token == tensors["token_ids"][b, t]
        assert rollout == tensors["rollout"][b, t]
        assert live == tensors["live"][b, t]
        assert replayed == tensors["replayed"][b, t]
        assert parted == tensors["parted"][b, t].tolist()


def test_every_token_is_drawn_equally_often():
    # Over many "steps" (other sample numbers), each of 64 positions is kept 8 in 64 times: chi-squared over positions.
    counts = np.zeros(64)
    for sample in range(600):
        shape = (64,)
        found = TokenDetails.from_tensors(
            torch.zeros(shape),
            torch.ones(shape, dtype=torch.bool),
            live=torch.zeros(shape),
            replayed=None,
            token_ids=torch.zeros(shape, dtype=torch.int64),
            sample_ids=torch.full(shape, sample),
            positions=torch.arange(64),
            keep=8,
            worst=0,
        )
        counts[found.drawn.position.numpy()] += 1
    expected = counts.sum() / 64
    chi2 = float(((counts - expected) ** 2 / expected).sum() / (1 - 8 / 64))
    assert 63 - 4 * math.sqrt(126) < chi2 < 63 + 4 * math.sqrt(126)


def test_hashes_do_not_collide_and_fill_the_range():
    samples, positions = torch.meshgrid(torch.arange(500), torch.arange(2000), indexing="ij")
    found = priorities(samples.flatten(), positions.flatten())
    assert found.unique().numel() == found.numel()
    share = (found.double() / 2**63).histc(16, -1, 1) / found.numel()
    assert (share - 1 / 16).abs().max() < 0.002
    # SplitMix64 itself, in Python's integers.
    x = (7 << 32) + 5 + 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    assert int(priorities(torch.tensor([7]), torch.tensor([5]))) % 2**64 == x


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["rollout", "live", "replayed"])
def test_what_is_not_finite_stays_out_and_is_counted(bad, side):
    tensors = step(2)
    tensors[side][tensors["mask"].nonzero().T.tolist()[0][::2], tensors["mask"].nonzero().T.tolist()[1][::2]] = bad
    tensors[side][~tensors["mask"]] = bad
    found = details(tensors, keep=10_000, worst=10_000)
    kept = int(tensors["mask"].sum()) // 2
    assert (found.tokens, found.left_out) == (kept, int(tensors["mask"].sum()) - kept)
    assert len(found.drawn) == len(found.furthest) == kept
    for tokens in (found.drawn, found.furthest):
        assert torch.stack([tokens.rollout, tokens.live, tokens.replayed]).isfinite().all()


@pytest.mark.parametrize("masked", ["none", "no tokens"])
def test_no_tokens_at_all(masked):
    tensors = step()
    if masked == "none":
        tensors["mask"] = torch.zeros_like(tensors["mask"])
    else:
        tensors = {name: tensor[:0] for name, tensor in tensors.items()}
    found = details(tensors)
    assert everything(found) == ([], [], 0, 0)
    assert everything(found + details(step())) == everything(details(step()) + found) == everything(details(step()))
    assert TokenDetails.empty().record(str, lambda sample: [])["worst"] == []


def test_memory_is_bounded():
    size = len(pickle.dumps(sum(TokenDetails.from_tensors(**step(seed)) for seed in range(20))))
    assert size < (1024 + 16) * (7 * 8 + LAYERS) + 10_000


def _of_rank(split):
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = step(5)
    mine = {name: tensor[slice(0, split) if rank == 0 else slice(split, None)] for name, tensor in whole.items()}
    assert size == 2
    return everything(details(mine).gather())


def test_ranks_hold_the_same_after_gathering():
    expected = everything(details(step(5)))
    ranks = Ranks(2)
    try:
        for split in (0, 4, SAMPLES):
            assert ranks.all(_of_rank, split) == [expected, expected]
    finally:
        ranks.close()
    assert everything(details(step(5)).gather()) == expected


def test_record_has_the_text_around_and_the_layers():
    text = [f"w{i}" for i in range(60)]
    tensors = {name: torch.zeros(1, 3) for name in ("rollout", "live")}
    tensors["live"][0, 1] = 0.75
    found = TokenDetails.from_tensors(
        **tensors,
        replayed=None,
        mask=torch.ones(1, 3, dtype=torch.bool),
        token_ids=torch.tensor([[29, 30, 31]]),
        sample_ids=torch.full((1, 3), 4),
        positions=torch.tensor([[29, 30, 31]]),
        parted=torch.tensor([[[False, False], [True, True], [False, True]]]),
        worst=1,
    )
    record = found.record(
        lambda ids: " ".join(text[i] for i in ids), {4: list(range(60))}.__getitem__, layer_ids=(3, 11)
    )
    assert record["worst"] == [
        {
            "sample": 4,
            "position": 30,
            "token_id": 30,
            "token": "w30",
            "before": " ".join(text[6:30]),
            "after": " ".join(text[31:55]),
            "live": 0.75,
            "replayed": None,
            "rollout": 0.0,
            "layers": [3, 11],
        }
    ]
    assert record["tokens"]["replayed"] is None
    assert sorted(record["tokens"]["live"]) == [0.0, 0.0, 0.75]
    assert (record["tokens_seen"], record["tokens_left_out"]) == (3, 0)


@pytest.mark.parametrize("sequence", [[29, 31, 30], [1]])
def test_a_token_that_is_not_where_its_sample_has_it(sequence):
    one = {"rollout": torch.zeros(1), "live": torch.ones(1), "replayed": None, "mask": torch.tensor([True])}
    ids = {"token_ids": torch.tensor([30]), "sample_ids": torch.tensor([0]), "positions": torch.tensor([1])}
    with pytest.raises(DiagnosticsError, match="expected token 30 at position 1 of sample 0, got"):
        TokenDetails.from_tensors(**one, **ids).record(str, lambda sample: sequence)


def test_what_does_not_fit_is_named():
    tensors = step()
    wrong = tensors | {"mask": tensors["mask"].long(), "positions": tensors["positions"][:, :3], "live": None}
    with pytest.raises(DiagnosticsError, match=r"(?s)mask: expected torch.bool.*positions: expected the shape"):
        details(wrong)
    with pytest.raises(DiagnosticsError, match="expected at least one of them"):
        details(tensors | {"live": None, "replayed": None})
    with pytest.raises(
        DiagnosticsError, match=r"rollout and live and replayed with 5 layers.*rollout and live with no"
    ):
        details(tensors) + details(tensors | {"replayed": None, "parted": None})
    with pytest.raises(DiagnosticsError, match="keep 40 and 1024"):
        details(tensors) + TokenDetails.empty()
