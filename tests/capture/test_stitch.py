"""Turns of a conversation are joined token by token and row by row, as a naive model of the engine says."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERTS, LAYERS, TOP_K

from r3 import CaptureError, RolloutRouting
from r3.capture import Rollout, compare_overlap, next_prompt_start, stitch, stitch_runs

LAYER_IDS = (0, 1, 2)


def row(position: int, prefill: int) -> list[list[int]]:
    """`[L, K]`: the row that the forwards of turn `prefill` give the token at `position`; two turns differ in order."""
    first = position + 3 * (prefill // 2)
    slots = (0, 1) if prefill % 2 else (1, 0)
    return [[(first + layer + slot) % EXPERTS for slot in slots] for layer in LAYER_IDS]


def turn(number: int, prompt: list[int], sampled: list[int], start: int = 0, lost: int = 0, **changes: Any) -> Rollout:
    """What `collect` makes of turn `number`: rows from `start` to the last token but one, without the `lost` last."""
    ids = prompt + sampled
    valid = torch.tensor([[start <= p < len(ids) - 1 - lost for p in range(len(ids))]])
    rows = torch.tensor([[row(p, number) for p in range(len(ids))]])
    made = dict(
        prompt_ids=prompt,
        token_ids=sampled,
        response_mask=torch.ones(len(sampled), dtype=torch.bool),
        logprobs=torch.tensor([-0.5 - number - p / 100 for p in range(len(prompt), len(ids))]),
        routing=RolloutRouting(rows, valid, LAYER_IDS, EXPERTS, weight_version=10 + number),
        finish_reason=f"reason {number}",
        prompt_index=number + 7,
        weight_versions=(10 + number,),
        row_versions=torch.full((len(ids),), 10 + number, dtype=torch.int32),
    )
    return Rollout(**made | changes)


def same(a: Rollout, b: Rollout) -> bool:
    assert a.routing is not None
    assert b.routing is not None
    return (
        a.prompt_ids == b.prompt_ids
        and a.token_ids == b.token_ids
        and torch.equal(a.response_mask, b.response_mask)
        and torch.equal(a.logprobs, b.logprobs)
        and torch.equal(a.routing.expert_ids, b.routing.expert_ids)
        and torch.equal(a.routing.valid, b.routing.valid)
        and a.routing.weight_version == b.routing.weight_version
        and torch.equal(a.row_versions, b.row_versions)
        and (a.finish_reason, a.prompt_index, a.weight_versions) == (b.finish_reason, b.prompt_index, b.weight_versions)
    )


@dataclasses.dataclass
class Plan:
    """One turn: new prompt tokens, sampled tokens, rows lost at the end, and how `prompt_start` is chosen."""

    new: int
    sampled: int
    lost: int
    start: int | None
    """None: as `next_prompt_start` says; else this many tokens less, at least 0."""


lost = st.sampled_from([0, 0, 0, 1, 3, 99])
plan = st.builds(Plan, st.integers(0, 5), st.integers(0, 5), lost, st.none() | st.integers(0, 20))
plans = st.lists(plan, min_size=1, max_size=6)


def played(plan: list[Plan]) -> list[Rollout]:
    """The turns of a conversation that goes as planned; token ids are all different."""
    turns: list[Rollout] = []
    ids = [100]
    for number, step in enumerate(plan):
        prompt = ids + list(range(1000 * number + 200, 1000 * number + 200 + step.new))
        start = next_prompt_start(turns)
        assert start < len(prompt)
        if step.start is not None:
            start = max(0, start - step.start)
        sampled = list(range(1000 * number + 700, 1000 * number + 700 + step.sampled))
        turns.append(turn(number, prompt, sampled, start, step.lost))
        ids = prompt + sampled
    return turns


@given(plans, st.sampled_from(["later", "earlier"]))
def test_every_token_has_what_a_naive_model_says(plan, overlap):
    turns = played(plan)
    found = stitch(turns, overlap=overlap)
    assert found.routing is not None
    assert found.row_versions is not None
    assert found.prompt_ids == turns[0].prompt_ids
    assert found.prompt_ids + found.token_ids == turns[-1].prompt_ids + turns[-1].token_ids
    assert found.routing.shape == (1, len(found), LAYERS, TOP_K)
    assert len(found.response_mask) == len(found.logprobs) == len(found.token_ids)
    begin = len(found.prompt_ids)
    for position in range(len(found)):
        # Sampled by the turn whose completion it lies in.
        samplers = [t for t in turns if len(t.prompt_ids) <= position < len(t)]
        if position >= begin:
            assert bool(found.response_mask[position - begin]) == bool(samplers)
            expected = samplers[0].logprobs[position - len(samplers[0].prompt_ids)] if samplers else 0.0
            assert found.logprobs[position - begin] == expected
        captured = [n for n, t in enumerate(turns) if position < len(t) and t.routing.valid[0, position]]
        assert bool(found.routing.valid[0, position]) == bool(captured)
        if captured:
            prefill = captured[-1] if overlap == "later" else captured[0]
            assert found.routing.expert_ids[0, position].tolist() == row(position, prefill)
            assert found.row_versions[position] == 10 + prefill
        else:
            assert not found.routing.expert_ids[0, position].any()
            assert found.row_versions[position] == -1
    # An aborted turn that gave neither token nor row took no part.
    gave = [n for n, t in enumerate(turns) if t.token_ids or t.routing.valid.any()]
    assert found.weight_versions == tuple(10 + n for n in gave)
    versions = set(found.row_versions[found.routing.valid[0]].tolist())
    assert found.routing.weight_version == (versions.pop() if len(versions) == 1 else None)
    assert (found.finish_reason, found.prompt_index) == (turns[-1].finish_reason, 7)


@given(plans, st.data(), st.sampled_from(["later", "earlier"]))
def test_joined_turns_can_be_joined_further(plan, data, overlap):
    turns = played(plan)
    cut = data.draw(st.integers(1, len(turns)))
    first = stitch(turns[:cut], overlap=overlap)
    assert next_prompt_start(first) == next_prompt_start(turns[:cut])
    assert same(stitch([first, *turns[cut:]], overlap=overlap), stitch(turns, overlap=overlap))


@given(plans)
def test_the_next_prompt_starts_at_the_first_token_without_a_row(plan):
    turns = played(plan)
    valid = stitch(turns).routing.valid[0].tolist()
    start = next_prompt_start(turns)
    assert all(valid[:start])
    assert not valid[start]
    # Every later prompt is at least as long as this conversation: vLLM's bound holds whatever comes.
    assert start < len(turns[-1])


@given(plans)
def test_overlap_is_counted_against_the_first_capture(plan):
    turns = played(plan)
    report = compare_overlap(turns)
    rows = differing = 0
    for position in range(len(turns[-1])):
        captured = [n for n, t in enumerate(turns) if position < len(t) and t.routing.valid[0, position]]
        rows += max(0, len(captured) - 1)
        differing += sum(sorted(row(0, n)[0]) != sorted(row(0, captured[0])[0]) for n in captured[1:])
    assert (report.rows, report.differing_rows, report.layer_ids) == (rows, differing, LAYER_IDS)
    assert report.differing_by_layer == (differing,) * LAYERS


def test_with_prompt_start_each_row_travels_once():
    turns = played([Plan(3, 4, 0, None), Plan(2, 3, 0, None), Plan(5, 1, 0, None)])
    joined = stitch(turns)
    assert sum(t.routing.rows_valid for t in turns) == joined.routing.rows_valid == len(joined) - 1
    assert compare_overlap(turns).rows == 0
    assert same(joined, stitch(turns, overlap="earlier"))
    again = played([Plan(3, 4, 0, 99), Plan(2, 3, 0, 99), Plan(5, 1, 0, 99)])
    assert sum(t.routing.rows_valid for t in again) > 2 * joined.routing.rows_valid
    assert same(joined, stitch(again, overlap="earlier"))


def test_the_boundary_row_comes_from_the_next_turn_and_from_nowhere_else():
    first = turn(0, [1, 2, 3], [4, 5])
    second = turn(1, [1, 2, 3, 4, 5, 6], [7, 8], start=4)
    rows = stitch([first, second]).routing.expert_ids[0]
    assert rows.tolist() == [row(p, 0) for p in range(4)] + [row(p, 1) for p in range(4, 7)] + [[[0, 0]] * LAYERS]
    assert stitch([first]).routing.valid.tolist() == [[True] * 4 + [False]]


def test_without_a_choice_the_row_under_which_a_token_was_sampled_stays():
    turns = played([Plan(3, 4, 0, 99), Plan(2, 3, 0, 99)])
    assert compare_overlap(turns).rows
    assert same(stitch(turns), stitch(turns, overlap="earlier"))
    assert not same(stitch(turns), stitch(turns, overlap="later"))


def test_a_turn_that_is_missing_at_the_end_or_between_leaves_its_tokens_unsampled():
    turns = played([Plan(3, 4, 0, 99), Plan(2, 3, 0, 99), Plan(5, 1, 0, 99)])
    assert stitch(turns[:2]).token_ids == stitch(turns).token_ids[: len(turns[1]) - len(turns[0].prompt_ids)]
    without = stitch([turns[0], turns[2]])
    assert without.token_ids == stitch(turns).token_ids
    assert without.response_mask.sum() == 5
    assert without.routing.rows_valid == len(without) - 1


def test_turns_without_routing_are_joined_without():
    turns = [dataclasses.replace(t, routing=None) for t in played([Plan(3, 4, 0, None), Plan(2, 3, 0, None)])]
    joined = stitch(turns, overlap="later")
    assert joined.routing is None
    assert joined.row_versions.tolist() == [11] * (len(joined) - 1) + [-1]
    # Version 10 consumed all of the first turn but its last token.
    first = len(turns[0]) - 1
    earlier = stitch(turns, overlap="earlier").row_versions.tolist()
    assert earlier == [10] * first + [11] * (len(joined) - 1 - first) + [-1]
    assert stitch([dataclasses.replace(t, row_versions=None) for t in turns]).row_versions is None
    with pytest.raises(CaptureError, match="turn 0 has no routing"):
        next_prompt_start(turns)
    with pytest.raises(CaptureError, match="no rows to compare"):
        compare_overlap(turns)


def test_versions_that_nobody_told_are_unknown_row_by_row():
    turns = played([Plan(3, 4, 0, None), Plan(2, 3, 0, None)])
    turns[1] = dataclasses.replace(turns[1], row_versions=None, weight_versions=())
    joined = stitch(turns)
    assert joined.row_versions.tolist() == [10] * 7 + [-1] * (len(joined) - 7)
    assert joined.weight_versions == (10,)
    assert joined.spans_versions
    assert joined.weight_version is None


def test_drift_is_refused_with_the_place_and_the_tokens_around_it():
    first = turn(0, [1, 2, 3], [4, 5, 6])
    message = (
        r"turns 0 and 1 part at position 4 \(sampled token 1 of turn 0\): expected \[1 2 3 4 >5< 6\], "
        r"got \[1 2 3 4 >50< 6 7 8 9 ...\](?s:.*)stitch_runs"
    )
    with pytest.raises(CaptureError, match=message):
        stitch([first, turn(1, [1, 2, 3, 4, 50, 6, 7, 8, 9, 10], [11])])
    with pytest.raises(CaptureError, match=r"position 1 \(in the prompt of turn 0\): expected \[1 >2< 3 4 5 6\]"):
        stitch([first, turn(1, [1, 20, 3, 4, 5, 6, 7], [8])])
    with pytest.raises(CaptureError, match=r"position 4 .*got \[1 2 3 4 >end<\]"):
        stitch([first, turn(1, [1, 2, 3, 4], [8])])
    with pytest.raises(CaptureError, match=r"(?s)turns 0 and 1 part.*turns 1 and 2 part"):
        stitch([first, turn(1, [9, 9], [8]), turn(2, [7, 7], [8])])


def test_runs_begin_where_thinking_was_dropped_and_keep_every_sampled_token_once():
    # Sampled: thinking 4 5, answer 6. The next prompt has the answer alone.
    first = turn(0, [1, 2, 3], [4, 5, 6])
    second = turn(1, [1, 2, 3, 6, 7], [8, 9])
    third = turn(2, [1, 2, 3, 6, 7, 8, 9, 10], [11], start=6)
    one, two = stitch_runs([first, second, third])
    assert same(one, stitch([first]))
    assert same(two, stitch([second, third]))
    assert two.prompt_ids == second.prompt_ids
    assert int(one.response_mask.sum() + two.response_mask.sum()) == 6
    assert same(stitch_runs([second, third])[0], two)


def test_rows_before_the_drift_come_from_the_turns_before_it():
    first = turn(0, [1, 2, 3], [4, 5, 6])
    prompt = [1, 2, 3, 6, 7]
    start = next_prompt_start([first], prompt)
    assert start == 3
    second = turn(1, prompt, [8, 9], start=start)
    _, two = stitch_runs([first, second])
    assert two.routing.expert_ids[0, :6].tolist() == [row(p, 0) for p in range(3)] + [row(p, 1) for p in range(3, 6)]
    assert two.row_versions.tolist() == [10] * 3 + [11] * 3 + [-1]
    assert two.weight_versions == (10, 11)
    assert two.spans_versions
    # Its own rows, asked for from 0, leave the turns before it no part.
    for overlap in ("earlier", "later"):
        _, alone = stitch_runs([first, turn(1, prompt, [8, 9])], overlap=overlap)
        assert alone.weight_versions == (11,)
    # A prompt that became shorter than what is held: still below its length.
    assert next_prompt_start([first], [1, 2]) == 1
    assert next_prompt_start([]) == 0


def rebuilt(made: Rollout, **changes) -> Rollout:
    old = made.routing
    parts = dict(expert_ids=old.expert_ids, valid=old.valid, layer_ids=old.layer_ids, num_experts=old.num_experts)
    return dataclasses.replace(made, routing=RolloutRouting(**parts | changes))


def empty(made: Rollout) -> Rollout:
    nothing = made.logprobs[:0]
    return dataclasses.replace(
        made,
        prompt_ids=[],
        token_ids=[],
        response_mask=nothing.bool(),
        logprobs=nothing,
        row_versions=None,
        routing=None,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dataclasses.replace(t, routing=None), r"experts in layers .*\[0\]; no routing in turns \[1\]"),
        (lambda t: rebuilt(t, num_experts=64), r"2 of 8 experts .*\[0\]; 2 of 64 experts .*\[1\]"),
        (lambda t: rebuilt(t, layer_ids=(0, 1, 5)), r"\(0, 1, 2\).*\[0\]; .*\(0, 1, 5\).*\[1\]"),
        (lambda t: rebuilt(t, expert_ids=t.routing.expert_ids[..., :1]), "1 of 8 experts"),
        (empty, "turn 1: expected at least one token"),
    ],
)
def test_turns_of_different_kinds_are_refused(change, message):
    first, second = turn(0, [1, 2, 3], [4, 5]), turn(1, [1, 2, 3, 4, 5, 6], [7, 8])
    stitch([first, second])
    for join in (stitch, stitch_runs):
        with pytest.raises(CaptureError, match=rf"(?s)turns that cannot be joined:.*{message}"):
            join([first, change(second)])


def test_no_turns_and_unknown_choices_are_refused():
    with pytest.raises(CaptureError, match="at least one, got none"):
        stitch([])
    with pytest.raises(CaptureError, match="overlap: expected one of earlier, later, got 'both'"):
        stitch([turn(0, [1], [2])], overlap="both")  # pyrefly: ignore
