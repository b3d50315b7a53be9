"""The ids that tokens were sampled from: out of every answer of vLLM, and beside their tokens through every layout."""

import copy
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from r3 import CaptureError, ConfigError, R3Config
from r3.capture import (
    Rollout,
    Rollouts,
    SamplingMask,
    collect,
    load_rollouts,
    request_fields,
    sampling_kwargs,
    save_rollouts,
    stitch,
)
from r3.routing import Packing

SETS = [[3, 9], [7], [1, 2, 5, 8], [6, 4]]
SAMPLED = [9, 7, 5, 6]
SAMPLING = "generator.sampling_params"


@dataclass
class Entry:
    logprob: float


@dataclass
class Completion:
    logprobs: object
    token_ids: list = field(default_factory=lambda: SAMPLED)
    routed_experts: object = None
    finish_reason: str = "length"
    sampling_mask: object = None


@dataclass
class Output:
    outputs: list
    prompt_token_ids: list = field(default_factory=lambda: [10, 11])


@dataclass
class Flat:
    """As vLLM's `FlatLogprobs`."""

    start_indices: list
    end_indices: list
    token_ids: list
    logprobs: list

    def __len__(self):
        return len(self.start_indices)


def tops(asked=6):
    """(id, log-probability) of as many of the likeliest as were asked for, those that were taken out at the end."""
    rest = [[token for token in range(20) if token not in ids][: asked - len(ids)] for ids in SETS]
    return [
        [(token, math.log(1 / len(ids))) for token in ids] + [(token, -math.inf) for token in out]
        for ids, out in zip(SETS, rest, strict=True)
    ]


def flat(asked=6):
    places = [[(token, dict(top)[token]), *top] for token, top in zip(SAMPLED, tops(asked), strict=True)]
    ends = np.cumsum([len(place) for place in places]).tolist()
    joined = [pair for place in places for pair in place]
    return Flat([0, *ends[:-1]], ends, [token for token, _ in joined], [value for _, value in joined])


def by_engine(asked=6):
    objects = [{token: Entry(value) for token, value in top} for top in tops(asked)]
    return {"flat": Output([Completion(flat(asked))]), "objects": Output([Completion(objects)])}


def by_server(asked=6):
    def sent(value):
        return max(value, -9999.0)

    content = [
        {
            "token": f"token_id:{token}",
            "logprob": dict(top)[token],
            "top_logprobs": [{"token": f"token_id:{other}", "logprob": sent(value)} for other, value in top],
        }
        for token, top in zip(SAMPLED, tops(asked), strict=True)
    ]
    # As /inference/v1/generate from vLLM 0.32.
    ids = [
        {
            "token_id": token,
            "logprob": dict(top)[token],
            "rank": 1,
            "top_logprobs": [{"token_id": other, "logprob": sent(value), "rank": 1} for other, value in top],
        }
        for token, top in zip(SAMPLED, tops(asked), strict=True)
    ]
    completions = {
        "tokens": [f"token_id:{token}" for token in SAMPLED],
        "token_logprobs": [dict(top)[token] for token, top in zip(SAMPLED, tops(asked), strict=True)],
        "top_logprobs": [{f"token_id:{other}": sent(value) for other, value in top} for top in tops(asked)],
    }
    choice = {"index": 0, "token_ids": SAMPLED, "finish_reason": "length"}
    return {
        name: {"prompt_token_ids": [10, 11], "choices": [choice | {"logprobs": logprobs}]}
        for name, logprobs in (
            ("content", {"content": content}),
            ("ids", {"content": ids}),
            ("completions", completions),
        )
    }


def sets_of(mask):
    return [sorted(part.tolist()) for part in mask.token_ids.split(mask.sizes.flatten().tolist())]


@pytest.mark.parametrize("name", [*by_engine(), *by_server()])
def test_every_answer_gives_the_same_sets(name):
    (rollout,) = collect([(by_engine() | by_server())[name]], None, sampling_mask=True)
    assert rollout.sampling_mask.sizes.tolist() == [0, 0, 2, 1, 4, 2]
    assert sets_of(rollout.sampling_mask) == [[], [], *map(sorted, SETS)]
    assert collect([(by_engine() | by_server())[name]], None).items[0].sampling_mask is None


@pytest.mark.parametrize("name", [*by_engine(), *by_server()])
def test_a_set_that_may_be_larger_than_what_was_asked_for_is_refused(name):
    with pytest.raises(CaptureError, match=r"token 2 was sampled from \(1 of 4 tokens\).*likeliest.*logprobs of top_k"):
        collect([(by_engine(4) | by_server(4))[name]], None, sampling_mask=True)


def test_a_request_that_was_aborted_at_once_has_no_sets():
    nothing = Completion(Flat([], [], [], []), token_ids=[], finish_reason="abort")
    (rollout,) = collect([Output([nothing])], None, sampling_mask=True)
    assert rollout.sampling_mask.sizes.tolist() == [0, 0]


def test_log_probabilities_of_the_sampled_tokens_alone_are_refused():
    response = by_server()["content"]
    for entry in response["choices"][0]["logprobs"]["content"]:
        del entry["top_logprobs"]
    with pytest.raises(CaptureError, match="sampled from"):
        collect([response], None, sampling_mask=True)


def test_sets_that_vllm_gives_itself_are_taken():
    @dataclass
    class Native:
        token_ids: list

    output = by_engine()["flat"]
    output.outputs[0].sampling_mask = Native(SETS)
    output.outputs[0].logprobs = [{token: Entry(-0.5)} for token in SAMPLED]
    response = copy.deepcopy(by_server()["content"])
    response["choices"][0]["sampling_mask"] = SETS
    for given in (output, response, json.dumps(response)):
        (rollout,) = collect([given], None, sampling_mask=True)
        assert sets_of(rollout.sampling_mask) == [[], [], *map(sorted, SETS)]


@pytest.mark.parametrize(
    ("sizes", "ids", "message"),
    [
        ([2, 1], [3, 7, 6], r"token 1, 5: \[6\]"),  # without its own
        ([2, 2], [7, 7, 5, 1], r"token 0, 7: \[7, 7\]"),
        ([2, 1], [7, -1, 5], r"token 0, 7: \[7, -1\]"),
        ([2, 0], [7, 1], r"token 1, 5: \[\]"),
        ([1], [7], "expected a set of each of 2 sampled tokens, got 1"),
        ([1, 1], [7, 5, 3], "got 2 sets of 2 ids together, and 3 ids"),
    ],
)
def test_sets_that_cannot_be_are_refused(sizes, ids, message):
    with pytest.raises(CaptureError, match=message):
        SamplingMask.of(sizes, ids, sampled=[7, 5])


def rollout(prompt=(10, 11), sampled=SAMPLED, sets=SETS, **more):
    mask = SamplingMask.of([*map(len, sets)], [token for ids in sets for token in ids], sampled, first=len(prompt))
    return Rollout(
        prompt_ids=[*prompt],
        token_ids=[*sampled],
        response_mask=torch.ones(len(sampled), dtype=torch.bool),
        logprobs=torch.full((len(sampled),), -0.5),
        routing=None,
        finish_reason="stop",
        sampling_mask=mask,
        **more,
    )


def test_sets_stay_with_their_tokens_in_batches_selections_and_packed_rows():
    batch = Rollouts([rollout(), rollout((1,), [7], [[7, 2]]), rollout((1, 2, 3), SAMPLED[:2], SETS[:2])], None).batch(
        0
    )
    assert batch.sampling_mask.shape == batch.input_ids.shape == (3, 6)

    def by_token(mask, ids):
        return {
            (place, token): ids_of_set
            for place, (token, ids_of_set) in enumerate(zip(ids.flatten().tolist(), sets_of(mask), strict=True))
            if ids_of_set
        }

    assert [*by_token(batch.sampling_mask, batch.input_ids).values()] == [
        *map(sorted, SETS),
        [2, 7],
        *map(sorted, SETS[:2]),
    ]
    for (_, token), ids in by_token(batch.sampling_mask, batch.input_ids).items():
        assert token in ids
    chosen = batch.select([2, 0])
    assert sets_of(chosen.sampling_mask.select([1])) == [[], [], *map(sorted, SETS)]
    packing = Packing.from_mask(batch.attention_mask)
    packed = batch.sampling_mask.take(packing.pack(batch.sampling_mask.positions(), fill=-1))
    for (_, token), ids in by_token(packed, packing.pack(batch.input_ids)).items():
        assert token in ids
    assert packed.sizes.sum() == batch.sampling_mask.sizes.sum()


def test_a_place_that_takes_no_set_gets_none():
    mask = SamplingMask.of([2, 1], [3, 7, 5], sampled=[7, 5])
    assert sets_of(mask.take(torch.tensor([[1, -1, 0], [-1, 0, 0]]))) == [[5], [], [3, 7], [], [3, 7], [3, 7]]


def test_rollouts_with_and_without_sets_make_no_batch():
    with pytest.raises(CaptureError, match="expected one of each of 2 rollouts, or of none, got 1"):
        Rollouts([rollout(), replace(rollout(), sampling_mask=None)], None).batch(0)


def test_a_truncated_rollout_keeps_the_sets_of_what_is_left():
    assert sets_of(rollout().truncate(4).sampling_mask) == [[], [], *map(sorted, SETS[:2])]


def test_turns_join_with_their_sets():
    first = rollout()
    second = rollout((10, 11, *SAMPLED, 30), [1, 2], [[1], [2, 3]])
    joined = stitch([first, second])
    assert sets_of(joined.sampling_mask) == [[], [], *map(sorted, SETS), [], [1], [2, 3]]
    with pytest.raises(CaptureError, match="expected one of each turn, or of none, got 1 of 2"):
        stitch([first, replace(second, sampling_mask=None)])


def test_saved_rollouts_keep_their_sets(tmp_path):
    given = Rollouts([rollout(), replace(rollout(), sampling_mask=None), stitch([rollout()])], None)
    save_rollouts(given, tmp_path / "r")
    found = load_rollouts(tmp_path / "r")
    for mine, theirs in zip(found, given, strict=True):
        assert (mine.sampling_mask is None) == (theirs.sampling_mask is None)
        if mine.sampling_mask is not None:
            assert torch.equal(mine.sampling_mask.sizes, theirs.sampling_mask.sizes)
            assert torch.equal(mine.sampling_mask.token_ids, theirs.sampling_mask.token_ids)


def test_what_cuts_the_distribution_asks_for_its_sets():
    whole = sampling_kwargs(R3Config())
    assert (whole["top_p"], whole["top_k"], whole["min_p"], whole["logprobs"]) == (1.0, -1, 0.0, 0)
    config = R3Config.from_overrides([f"{SAMPLING}.top_k=20", f"{SAMPLING}.top_p=0.9", f"{SAMPLING}.min_p=0.05"])
    asked = sampling_kwargs(config)
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["logprobs"]) == (0.9, 20, 0.05, 24)
    chat = request_fields(config, "chat")
    assert chat["top_logprobs"] == 24
    assert (chat["extra_body"]["top_k"], chat["extra_body"]["min_p"], chat["top_p"]) == (20, 0.05, 0.9)


@pytest.mark.parametrize("setting", ["top_p=0.9", "min_p=0.1"])
def test_sets_without_a_bound_are_refused(setting):
    with pytest.raises(ConfigError, match=r"sampling_params.top_k: expected a number above 0"):
        R3Config.from_overrides([f"{SAMPLING}.{setting}"])
