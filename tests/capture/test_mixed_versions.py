"""Weights that change during a rollout: each row has the version of the forward that made it; a setting decides."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERTS, random_ids

from r3 import CaptureError, ConfigError, R3Config, RolloutRouting
from r3.capture import Rollout, Rollouts, resolve_mixed_versions, stamp_versions, stitch
from r3.config import MIXED_VERSIONS
from r3.routing import RoutingSpec

SPEC = RoutingSpec(layer_ids=(0, 1, 2), num_layers=3, num_experts=EXPERTS, top_k=2)
SETTING = "generator.inference_engine.mixed_weight_versions"


def rollout(prompt: int = 3, generated: int = 4, at: int = 0, **changes) -> Rollout:
    length = prompt + generated
    valid = torch.arange(length)[None] < length - 1
    made = dict(
        prompt_ids=list(range(prompt)),
        token_ids=list(range(100, 100 + generated)),
        response_mask=torch.ones(generated, dtype=torch.bool),
        logprobs=-torch.rand(generated),
        routing=RolloutRouting(random_ids(1, length, seed=at), valid, (0, 1, 2), EXPERTS),
        finish_reason="stop",
        prompt_index=at,
    )
    return Rollout(**made | changes)


class Engine:
    """A naive engine: each forward notes, for every token that it consumes for the first time, its own version."""

    def __init__(self, prompt: int) -> None:
        self.fed, self.rows, self.unfed = 0, [], prompt
        self.version = -1

    def sample(self) -> None:
        self.rows += [self.version] * self.unfed
        self.unfed = 1


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=5))
def test_rows_have_the_version_of_the_forward_that_made_them(prompt, phases):
    engine, boundaries, sampled, took_part = Engine(prompt), [], 0, set()
    for tokens, step in phases:
        engine.version += step
        boundaries.append((sampled, engine.version))
        for _ in range(tokens):
            engine.sample()
            took_part.add(engine.version)
        sampled += tokens
    stamped = stamp_versions(rollout(prompt, sampled), boundaries)
    if sampled:
        assert stamped.row_versions.tolist() == [*engine.rows, -1]
        assert stamped.weight_versions == tuple(sorted(took_part))
    else:
        assert stamped.row_versions.tolist() == [engine.version] * (prompt - 1) + [-1]
        assert stamped.weight_versions == (engine.version,)
    assert stamped.row_versions.dtype == torch.int32
    assert stamped.spans_versions == (len(took_part) > 1)
    assert stamped.weight_version == stamped.routing.weight_version
    assert stamped.weight_version == (None if len(took_part) > 1 else stamped.weight_versions[0])


def test_the_row_before_a_new_version_s_first_token_is_its_own():
    # Three prompt tokens; 100 and 101 sampled by version 5, 102 and 103 by version 6, which consumed 101 and 102.
    stamped = stamp_versions(rollout(3, 4), [(0, 5), (2, 6)])
    assert stamped.row_versions.tolist() == [5, 5, 5, 5, 6, 6, -1]
    assert stamp_versions(rollout(3, 4), [(0, 5), (4, 6)]).weight_versions == (5,)
    assert stamp_versions(rollout(3, 4, routing=None), [(0, 5), (1, 6)]).spans_versions


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "the first must be"),
        ([(1, 5)], "the first must be"),
        ([(0, 5), (3, 6), (2, 7)], r"2: \(2, 7\) after \(3, 6\)"),
        ([(0, 5), (3, 5)], r"1: \(3, 5\) after \(0, 5\)"),
        ([(0, 5), (3, 4)], r"1: \(3, 4\) after \(0, 5\)"),
        ([(0, -1)], "0: version -1"),
    ],
)
def test_boundaries_that_cannot_be_are_refused(boundaries, message):
    with pytest.raises(CaptureError, match=message):
        stamp_versions(rollout(), boundaries)


def test_joined_turns_are_not_stamped():
    with pytest.raises(CaptureError, match="stamp turns before stitching"):
        stamp_versions(rollout(response_mask=torch.tensor([True, False, True, True])), [(0, 1)])


def told(version: int, **changes) -> Rollout:
    made = stamp_versions(rollout(**changes), [(0, version)])
    assert not made.spans_versions
    return made


def test_policies_touch_the_rollouts_that_span_versions_and_no_others():
    mixed, one, silent = stamp_versions(rollout(at=1), [(0, 5), (2, 6)]), told(6, at=2), rollout(at=3)
    given_ = Rollouts([one, mixed, silent], SPEC, {1: "no routing"})

    kept = resolve_mixed_versions(given_, "keep")
    assert kept.items == [one, mixed, silent]
    assert (kept.mixed_versions, kept.failed) == (1, {1: "no routing"})

    cut = resolve_mixed_versions(given_, "invalidate")
    assert [cut.items[0], cut.items[2]] == [one, silent]
    found = cut.items[1]
    assert found.routing.valid.tolist() == [[False, False, False, False, True, True, False]]
    assert torch.equal(found.routing.expert_ids[0, 4:6], mixed.routing.expert_ids[0, 4:6])
    assert not found.routing.expert_ids[0, :4].any()
    assert found.routing.weight_version == 6
    assert mixed.routing.rows_valid == 6
    assert torch.equal(found.row_versions, mixed.row_versions)
    assert (cut.mixed_versions, cut.failed) == (1, {1: "no routing"})
    assert found.spans_versions, "its log-probabilities still are of two versions"

    dropped = resolve_mixed_versions(given_, "drop")
    assert dropped.items == [one, silent]
    # Its place among the outputs: the failed sample stood before it.
    assert dropped.failed.keys() == {1, 2}
    assert dropped.failed[2] == "sample 2 (prompt 1): the weights changed meanwhile, versions 5, 6"
    assert dropped.mixed_versions == 1
    assert given_.items == [one, mixed, silent]
    assert given_.failed == {1: "no routing"}


def test_rows_of_unknown_version_do_not_outlive_invalidate():
    part = torch.tensor([-1, 5, 5, 5, -1, 5, -1], dtype=torch.int32)
    partly = rollout(weight_versions=(5,), row_versions=part)
    assert partly.spans_versions
    assert partly.weight_version is None
    found = resolve_mixed_versions(Rollouts([partly], SPEC), "invalidate").items[0]
    assert found.routing.valid.tolist() == [[False, True, True, True, False, True, False]]
    with pytest.raises(CaptureError, match="version 5 and unknown ones"):
        resolve_mixed_versions(Rollouts([partly], SPEC), "drop")
    unsaid = rollout(weight_versions=(4, 5))
    assert unsaid.spans_versions
    assert resolve_mixed_versions(Rollouts([unsaid], SPEC), "invalidate").items[0].routing.rows_valid == 0
    # A version of a row that was never captured says nothing.
    assert not rollout(
        weight_versions=(5,), row_versions=part.clamp(min=5).index_fill(0, torch.tensor(6), -1)
    ).spans_versions


def test_a_conversation_over_two_syncs_keeps_the_rows_of_the_last():
    first = told(5)
    ids = first.prompt_ids + first.token_ids
    valid = (torch.arange(len(ids) + 3)[None] >= len(ids) - 1) & (torch.arange(len(ids) + 3)[None] < len(ids) + 2)
    rows = RolloutRouting(random_ids(1, len(ids) + 3, seed=9), valid, (0, 1, 2), EXPERTS)
    sampled = dict(token_ids=[60, 61], response_mask=torch.tensor([True] * 2), logprobs=torch.zeros(2))
    second = dataclasses.replace(rollout(), prompt_ids=[*ids, 50], routing=rows, **sampled)
    joined = stitch([first, stamp_versions(second, [(0, 6)])])
    assert joined.spans_versions
    assert joined.row_versions.tolist() == [5] * 6 + [6] * 3 + [-1]
    found = resolve_mixed_versions(Rollouts([joined], SPEC), "invalidate").items[0]
    assert found.routing.valid.tolist() == [[False] * 6 + [True] * 3 + [False]]


def test_without_routing_there_is_nothing_to_invalidate_but_something_to_drop():
    plain = stamp_versions(rollout(routing=None), [(0, 5), (2, 6)])
    one = stamp_versions(rollout(routing=None), [(0, 5)])
    assert resolve_mixed_versions(Rollouts([plain], None), "invalidate").items == [plain]
    assert resolve_mixed_versions(Rollouts([plain, one], None), "drop").items == [one]
    with pytest.raises(CaptureError, match=r"all 1 rollouts span weight versions(?s:.*)versions 5, 6"):
        resolve_mixed_versions(Rollouts([plain], None), "drop")
    assert resolve_mixed_versions(Rollouts([], None), "drop").items == []


def test_the_setting_is_one_of_the_policies():
    assert R3Config().to_flat()[SETTING] == "keep"
    for policy in MIXED_VERSIONS:
        assert R3Config.from_overrides([f"{SETTING}={policy}"]).to_flat()[SETTING] == policy
    with pytest.raises(ConfigError, match=rf"{SETTING}: expected one of keep, invalidate, drop, got 'mask'"):
        R3Config.from_overrides([f"{SETTING}=mask"])
    with pytest.raises(CaptureError, match="policy: expected one of keep, invalidate, drop, got 'mask'"):
        resolve_mixed_versions(Rollouts([], None), "mask")
