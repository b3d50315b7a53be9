"""Rows that lack some layers: whatever moves routing keeps each (token, layer) pair, valid or not.

The reference is a plain tensor in which what is not valid is -1.
"""

import copy
import hashlib
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3 import CaptureError, RolloutRouting, RoutingError
from r3.capture import Rollout, Rollouts, collect, load_rollouts, next_prompt_start, save_rollouts, stitch
from r3.capture.weight_versions import resolve_mixed_versions
from r3.diagnostics import LoadSums, MarginSums, compare_routing
from r3.routing import Packing, RoutingSpec, pad, shard

LAYER_IDS, EXPERTS, TOP_K = (1, 2, 5), 300, 2
SPEC = RoutingSpec(layer_ids=LAYER_IDS, num_layers=6, num_experts=EXPERTS, top_k=TOP_K, table_layers=(0, 3, 4))
run = settings(max_examples=40, deadline=None, derandomize=True)


def random_routing(b=2, s=9, *, seed=0, form="partial", version=3) -> RolloutRouting:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(b, s, len(LAYER_IDS), EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    valid = torch.rand(b, s, len(LAYER_IDS), generator=generator) < 0.6
    return RolloutRouting(ids, valid if form == "partial" else valid[..., 0], LAYER_IDS, EXPERTS, version)


def marked(routing: RolloutRouting) -> torch.Tensor:
    validity = routing.validity if routing.validity.dim() == 3 else routing.validity[..., None]
    return routing.expert_ids.long().masked_fill(~validity[..., None], -1)


def require(routing: RolloutRouting, expected: torch.Tensor) -> None:
    """It holds `expected`, zeros elsewhere, and says so of rows and pairs."""
    assert torch.equal(marked(routing), expected)
    pairs = expected[..., 0] >= 0
    assert not routing.expert_ids[~pairs].any()
    assert torch.equal(routing.valid, pairs.all(-1))
    assert torch.equal(routing.captured, pairs.any(-1))
    assert (routing.rows_valid, routing.pairs_valid) == (int(pairs.all(-1).sum()), int(pairs.sum()))


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@run
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 4), st.integers(0, 99))
def test_each_way_to_lay_rows_out_moves_pairs_as_it_moves_a_tensor(lengths, size, seed):
    mask = mask_of(lengths, max(lengths))
    whole = random_routing(*mask.shape, seed=seed).only(mask)
    expected = marked(random_routing(*mask.shape, seed=seed)).masked_fill(~mask[..., None, None], -1)
    require(whole, expected)
    packing = Packing.from_mask(mask, row_length=max(lengths) + 2, multiple_of=2)
    packed, rows = whole.pack(packing), packing.pack(expected, fill=-1)
    require(packed, rows)
    require(packed.unpack(packing), expected)
    slices = [packed.shard(rank, size) for rank in range(size)]
    for rank, part in enumerate(slices):
        require(part, shard(rows, rank, size, fill=-1))
    require(RolloutRouting.unshard(slices, packed.shape[1]), rows)
    for left in (False, True):
        require(whole.pad(12, side="left" if left else "right"), pad(expected, 12, left=left, fill=-1))
    require(whole.select([len(lengths) - 1, 0]), expected[[-1, 0]])
    require(whole.select(slice(0, 1)), expected[:1])
    require(whole.layers((1, 5)), expected[:, :, [0, 2]])
    require(whole.to("cpu"), expected)


@run
@given(st.lists(st.sampled_from(["partial", "whole"]), min_size=1, max_size=4), st.integers(0, 99))
def test_parts_of_both_forms_become_one_batch(forms, seed):
    parts = [random_routing(i + 1, 5 + i, seed=seed + i, form=form) for i, form in enumerate(forms)]
    made = RolloutRouting.cat(parts, length=10)
    require(made, torch.cat([pad(marked(part), 10, fill=-1) for part in parts]))
    assert made.validity.dim() == (3 if any(part.validity.dim() == 3 for part in parts) else 2)
    slices = [random_routing(2, 5, seed=seed + i, form=form) for i, form in enumerate(forms)]
    whole = torch.cat([marked(part) for part in slices], 1)
    require(RolloutRouting.unshard(slices, whole.shape[1]), whole)


@run
@given(st.integers(0, 99), st.booleans(), st.sampled_from(["few", "many", "runs"]))
def test_bytes_and_copies_give_the_same_pairs_back(seed, compress, share):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(2, 40, 3, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    validity = torch.rand(2, 40, 3, generator=generator) < (0.5 if share == "many" else 0.95)
    validity[:, 20:] |= share == "runs"
    routing = RolloutRouting(ids, validity, LAYER_IDS, EXPERTS)
    for again in (
        RolloutRouting.from_bytes(routing.to_bytes(compress=compress)),
        pickle.loads(pickle.dumps(routing)),
        copy.deepcopy(routing),
    ):
        require(again, marked(routing))


# Of the code before messages could say what is valid by layer.
GOLDEN = {
    ("runs", 60, 7): "f966a27b3ede807f",
    ("runs", 300, None): "4019e2fefcfb7521",
    ("bits", 60, 7): "233b5135dfcf7ddb",
    ("bits", 300, None): "ba5864d5466a174e",
}


@pytest.mark.parametrize(("form", "experts", "version"), GOLDEN)
def test_messages_of_whole_rows_are_byte_for_byte_those_of_version_1(form, experts, version):
    ids = torch.arange(4).repeat(2, 40, 3, 1) * 3 + torch.arange(40)[None, :, None, None]
    valid = mask_of([40, 17], 40) if form == "runs" else torch.arange(80).view(2, 40) % 3 > 0
    by_layer = valid[..., None].repeat(1, 1, 3)
    for given_ in (valid, by_layer):
        routing = RolloutRouting(ids, given_, LAYER_IDS, experts, version)
        assert routing.validity.dim() == 2
        assert hashlib.sha256(routing.to_bytes()).hexdigest()[:16] == GOLDEN[form, experts, version]
    by_layer[0, 1, 1] = ~by_layer[0, 1, 1]
    partial = RolloutRouting(ids, by_layer, LAYER_IDS, experts, version)
    assert partial.to_bytes()[8:10] == b"\2\0"
    # Without the pair that differs all layers agree again.
    whole = RolloutRouting(ids, valid, LAYER_IDS, experts, version)
    assert partial.select([1]).to_bytes() == whole.select([1]).to_bytes()


def test_every_flipped_bit_and_each_truncation_of_a_message_with_partial_rows_is_refused():
    message = random_routing(1, 12, seed=4).to_bytes()
    for end in range(len(message)):
        with pytest.raises(RoutingError):
            RolloutRouting.from_bytes(message[:end])
    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RoutingError):
            RolloutRouting.from_bytes(flipped)


def test_a_wrong_row_is_placed_and_what_is_not_valid_is_not_looked_at():
    ids = marked(random_routing())
    validity = ids[..., 0] >= 0
    sample, position, layer = validity.nonzero()[5].tolist()
    ids[sample, position, layer] = 7
    place = LAYER_IDS[layer]
    with pytest.raises(RoutingError, match=rf"sample {sample}, position {position}, decoder layer {place}: "):
        RolloutRouting(ids, validity, LAYER_IDS, EXPERTS)
    validity[sample, position, layer] = False
    require(RolloutRouting(ids, validity, LAYER_IDS, EXPERTS), ids.masked_fill(~validity[..., None], -1))
    with pytest.raises(RoutingError, match=r"valid: expected bool \[B, S\] = \(2, 9\) or \[B, S, L\]"):
        RolloutRouting(ids, validity[..., :2], LAYER_IDS, EXPERTS)


def rollout(prompt: list[int], sampled: list[int], routing: RolloutRouting, version: int = 3) -> Rollout:
    return Rollout(
        prompt_ids=prompt,
        token_ids=sampled,
        response_mask=torch.ones(len(sampled), dtype=torch.bool),
        logprobs=torch.zeros(len(sampled)),
        routing=routing,
        finish_reason="stop",
        weight_versions=(version,),
        row_versions=torch.full((len(prompt) + len(sampled),), version, dtype=torch.int32),
    )


def test_rollouts_are_saved_batched_and_cut_to_a_version_with_their_pairs(tmp_path):
    items = [rollout([1, 2], [3] * n, random_routing(1, 2 + n, seed=n)) for n in (1, 30, 5)]
    saved = Rollouts(items, SPEC)
    again = load_rollouts(save_rollouts(saved, tmp_path / "rollouts"))
    for one, other in zip(saved, again, strict=True):
        require(other.routing, marked(one.routing))
    require(again.batch(0).routing, torch.cat([pad(marked(item.routing), 32, fill=-1) for item in items]))
    told = items[1].row_versions.clone()
    told[10:] = 4
    mixed = replace(items[1], weight_versions=(3, 4), row_versions=told)
    (cut,) = resolve_mixed_versions(Rollouts([mixed], SPEC), "invalidate")
    require(cut.routing, marked(items[1].routing).masked_fill((told < 4)[None, :, None, None], -1))
    told[:] = torch.where(items[1].routing.captured[0] & ~items[1].routing.valid[0], -1, 3)
    assert replace(items[1], row_versions=told).spans_versions  # rows that lack a layer are rows


@pytest.mark.parametrize("overlap", ["earlier", "later"])
def test_a_conversation_takes_whole_rows_before_those_that_lack_layers(overlap):
    turns = []
    for number, length in enumerate((6, 9, 12)):
        routing = random_routing(1, length, seed=number, form="whole" if number == 1 else "partial", version=number)
        ids = list(range(length))
        turns.append(rollout(ids[: length - 2], ids[length - 2 :], routing, number))
    order = range(3) if overlap == "earlier" else range(2, -1, -1)
    expected = torch.full((1, 12, 3, TOP_K), -1)
    for position in range(12):
        held = [marked(turns[i].routing)[0, position] for i in order if position < len(turns[i])]
        whole = [row for row in held if bool((row >= 0).all())]
        some = [row for row in held if bool((row >= 0).any())]
        if whole or some:
            expected[0, position] = (whole or some)[0]
    require(stitch(turns, overlap=overlap).routing, expected)
    whole = sum((pad(turn.routing.valid, 12).long() for turn in turns), torch.zeros(1, 12, dtype=torch.int64))[0] > 0
    assert next_prompt_start(turns) == int(whole.long().cumprod(0).sum())


def captured(array: np.ndarray) -> Rollout:
    tokens = len(array) - 1
    completion = SimpleNamespace(
        index=0,
        token_ids=list(range(tokens)),
        logprobs=[{t: SimpleNamespace(logprob=-0.1)} for t in range(tokens)],
        routed_experts=array,
        finish_reason="stop",
    )
    return collect([SimpleNamespace(prompt_token_ids=[1, 2], outputs=[completion])], SPEC).items[0]


def test_an_engine_may_mark_what_it_did_not_capture_but_no_layer_in_all_rows():
    array = np.zeros((8, 6, TOP_K), np.int16)
    expected = marked(random_routing(1, 8, seed=2))
    array[:, LAYER_IDS] = expected[0].numpy()
    require(captured(array).routing, pad(expected, 9, fill=-1))
    array[:, 2] = -1
    with pytest.raises(CaptureError, match=r"decoder layers \[2\] were never captured"):
        captured(array)
    # Ones in all bits are an id where the dtype is unsigned.
    for dtype in (np.uint16, np.uint64):
        array = np.zeros((8, 6, TOP_K), dtype)
        array[:, LAYER_IDS] = [3, 4]
        array[3, 1] = np.iinfo(dtype).max
        with pytest.raises(CaptureError, match=r"1 \(token, layer\) rows(?s:.*)position 3, decoder layer 1"):
            captured(array)


def test_pairs_that_are_not_valid_do_not_count_in_a_comparison():
    theirs = random_routing(3, 20, seed=1)
    mine = torch.where(torch.rand(3, 20, 3, 1) < 0.5, marked(theirs).clamp(min=0), torch.tensor([298, 299]))
    validity = theirs.validity
    found = compare_routing(mine, marked(theirs), validity, LAYER_IDS)
    differs = (mine.sort(-1).values != marked(theirs).sort(-1).values).any(-1)
    assert found["rows"] == int(validity.any(-1).sum())
    assert found["differing_rows"] == pytest.approx(float(differs[validity].float().mean()))
    assert found["differing_tokens"] == pytest.approx(
        float((differs & validity).any(-1)[validity.any(-1)].float().mean())
    )
    for column, layer in enumerate(LAYER_IDS):
        expected = float(differs[..., column][validity[..., column]].float().mean())
        assert found[f"differing_rows/layer_{layer:02d}"] == pytest.approx(expected)

    load = LoadSums.from_tensors(mine, marked(theirs), validity, num_experts=EXPERTS, layer_ids=LAYER_IDS)
    for side, ids in enumerate((mine, marked(theirs))):
        for column in range(3):
            chosen = ids[:, :, column][validity[..., column]].flatten()
            assert torch.equal(load.counts[side, column], torch.bincount(chosen, minlength=EXPERTS))

    margins = torch.rand(3, 20, 3).masked_fill(~validity, torch.nan)
    sums = MarginSums.from_tensors(margins, mine, marked(theirs), validity)
    assert sums.counts.sum(1).tolist() == [int((validity & ~differs).sum()), int((validity & differs).sum())]
