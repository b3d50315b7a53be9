"""A rollout is cut with all that belongs to it, and turns are joined whose last tokens a chat template dropped."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERTS, LAYERS
from test_stitch import LAYER_IDS, row, same, turn

from r3 import CaptureError, RolloutRouting
from r3.capture import Rollout, Rollouts, next_prompt_start, resolve_mixed_versions, stamp_versions, stitch, stitch_runs
from r3.routing import RoutingSpec

SPEC = RoutingSpec(layer_ids=LAYER_IDS, num_layers=LAYERS, num_experts=EXPERTS, top_k=2)


def told(made: Rollout) -> Rollout:
    """Without the version of the last token's row, which there is not: `collect` tells it all the same."""
    assert made.row_versions is not None
    return dataclasses.replace(made, row_versions=torch.cat([made.row_versions[:-1], torch.tensor([-1]).int()]))


@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 9), st.integers(0, 3), st.integers(0, 12))
def test_a_cut_rollout_is_what_shorter_sampling_gives(prompt, sampled, limit, start, lost):
    ids = list(range(prompt)), list(range(50, 50 + sampled))
    whole = turn(0, *ids, start, lost)
    if limit >= sampled:
        assert whole.truncate(max_response_length=limit) is whole
        assert whole.truncate(prompt + limit) is whole
        return
    if not limit:
        with pytest.raises(CaptureError, match=f"a token after the prompt of {prompt} tokens .*max_length={prompt}"):
            whole.truncate(prompt)
        return
    # Rows that are lost are the last ones: fewer of them are lost of the cut one.
    short = turn(0, ids[0], ids[1][:limit], start, max(0, lost - (sampled - limit)), finish_reason="length")
    for cut in (
        whole.truncate(prompt + limit),
        whole.truncate(max_response_length=limit),
        whole.truncate(prompt + limit, max_response_length=limit + 1),
        whole.truncate(prompt + limit + 1, max_response_length=limit),
    ):
        assert same(cut, told(short))
    assert whole.routing.rows_valid == turn(0, *ids, start, lost).routing.rows_valid


def test_a_batch_of_cut_rollouts_ends_where_they_end():
    found = Rollouts([turn(0, [1, 2, 3, 4], list(range(5, 25))), turn(1, [1, 2], [3, 4])], SPEC).truncate(8)
    batch = found.batch(0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch.response_mask.sum(1).tolist() == [4, 2]
    assert batch.routing.valid.sum(1).tolist() == [7, 3]
    assert [rollout.finish_reason for rollout in found] == ["length", "reason 1"]
    with pytest.raises(CaptureError, match=r"expected room for a token after the prompt of 4 tokens \(prompt 7\)"):
        found.truncate(4)
    for wrong in ({}, {"max_length": -1}, {"max_response_length": -2}):
        with pytest.raises(CaptureError, match="expected max_length or max_response_length from 0 up"):
            found.truncate(**wrong)


def test_versions_of_which_nothing_is_left_took_no_part():
    spanning = stamp_versions(turn(0, [1, 2, 3], [4, 5, 6, 7]), [(0, 5), (2, 6)])
    assert spanning.spans_versions
    both, one = spanning.truncate(6), spanning.truncate(5)
    assert (both.weight_versions, both.row_versions.tolist()) == ((5, 6), [5, 5, 5, 5, 6, -1])
    assert (one.weight_versions, one.row_versions.tolist()) == ((5,), [5, 5, 5, 5, -1])
    assert (both.routing.weight_version, one.routing.weight_version) == (None, 5)
    assert not one.spans_versions


def test_a_cut_conversation_keeps_what_stands_between_turns():
    first, second = turn(0, [1, 2], [3, 4]), turn(1, [1, 2, 3, 4, 5, 6], [7, 8])
    cut = stitch([first, second]).truncate(6)
    assert (cut.token_ids, cut.response_mask.tolist()) == ([3, 4, 5, 6], [True, True, False, False])
    assert cut.routing.valid.tolist() == [[True] * 5 + [False]]
    # What is asked for next is what the cut one lacks.
    assert next_prompt_start(cut) == 5


@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("name", ["response_mask", "logprobs", "row_versions", "routing", "token_ids", "prompt_ids"])
def test_parts_of_other_lengths_are_refused_wherever_a_rollout_is_made(name, count):
    whole = turn(0, [1, 2], [3, 4, 5, 6])
    parts = {
        "response_mask": torch.ones(count, dtype=torch.bool),
        "logprobs": torch.zeros(count),
        "row_versions": torch.zeros(count, dtype=torch.int32),
        "routing": RolloutRouting(torch.zeros(1, count, 1, 2).long(), torch.zeros(1, count).bool(), (0,), EXPERTS),
        "token_ids": [9] * count,
        "prompt_ids": [9] * count,
    }
    with pytest.raises(CaptureError, match=r"a rollout of \d prompt and \d generated tokens \(prompt 7\):\n"):
        dataclasses.replace(whole, **{name: parts[name]})
    with pytest.raises(CaptureError, match=r"expected \[4\], got \[4, 1\]"):
        dataclasses.replace(whole, logprobs=torch.zeros(4, 1))
    with pytest.raises(CaptureError, match=r"routing: expected \[1, 6, 3, 2\], got \[2, 6, 3, 2\]"):
        dataclasses.replace(whole, routing=RolloutRouting.cat([whole.routing] * 2))


def conversation(plan: list[tuple[int, int, int, int]]) -> list[Rollout]:
    """Turns of (new prompt tokens, sampled tokens, of these dropped by the next prompt, rows lost)."""
    turns: list[Rollout] = []
    ids = [100]
    for number, (new, sampled, dropped, lost) in enumerate(plan):
        prompt = ids + list(range(1000 * number + 200, 1000 * number + 200 + new))
        made = list(range(1000 * number + 700, 1000 * number + 700 + sampled))
        turns.append(turn(number, prompt, made, next_prompt_start(turns, prompt), lost))
        ids = prompt + made[: max(0, sampled - dropped)]
    return turns


plans = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 2), st.sampled_from([0, 0, 1, 9])),
    min_size=1,
    max_size=5,
)


@given(plans, st.sampled_from(["later", "earlier"]), st.data())
def test_tokens_that_the_next_prompt_dropped_are_trimmed(plan, overlap, data):
    turns = conversation(plan)
    found = stitch(turns, overlap=overlap, trim=2)
    ids = turns[-1].prompt_ids + turns[-1].token_ids
    assert found.prompt_ids + found.token_ids == ids
    ends = [len(t) - min(drop, sampled) for t, (_, sampled, drop, _) in zip(turns[:-1], plan, strict=False)]
    for position in range(len(found)):
        holding = [n for n, end in enumerate([*ends, len(ids)]) if position < end]
        captured = [n for n in holding if turns[n].routing.valid[0, position]]
        assert bool(found.routing.valid[0, position]) == bool(captured)
        if captured:
            taken = captured[-1] if overlap == "later" else captured[0]
            assert found.routing.expert_ids[0, position].tolist() == row(position, taken)
            assert found.row_versions[position] == 10 + taken
        sampler = [n for n in holding if position >= len(turns[n].prompt_ids)]
        if position >= len(found.prompt_ids):
            expected = turns[sampler[0]].logprobs[position - len(turns[sampler[0]].prompt_ids)] if sampler else 0.0
            assert found.logprobs[position - len(found.prompt_ids)] == expected
            assert bool(found.response_mask[position - len(found.prompt_ids)]) == bool(sampler)
    cut = data.draw(st.integers(1, len(turns)))
    first = stitch(turns[:cut], overlap=overlap, trim=2)
    assert same(stitch([first, *turns[cut:]], overlap=overlap, trim=2), found)


def test_end_tokens_that_a_template_drops_leave_one_sequence():
    stop = 99
    turns = [
        turn(0, [10], [4, 5, 6, stop]),
        turn(1, [10, 4, 5, 6, 20], [7, 8, 9, stop], start=4),
        turn(2, [10, 4, 5, 6, 20, 7, 8, 9, 30], [stop], start=8),
    ]
    joined = stitch(turns, trim=1)
    assert joined.prompt_ids + joined.token_ids == [10, 4, 5, 6, 20, 7, 8, 9, 30, stop]
    assert joined.response_mask.tolist() == [True, True, True, False, True, True, True, False, True]
    assert joined.routing.expert_ids[0, :-1].tolist() == [row(p, p // 4) for p in range(9)]
    assert same(stitch_runs(turns, trim=1)[0], joined)
    assert len(stitch_runs(turns)) == 3
    for trim in (0, -1):
        with pytest.raises(CaptureError, match="trim=n" if not trim else "trim: expected a number of tokens from 0 up"):
            stitch(turns, trim=trim)


def test_what_is_no_end_of_a_turn_is_not_trimmed():
    first = turn(0, [1, 2, 3], [4, 5])
    # Into the prompt, in the middle, and tokens that nobody sampled.
    for prompt in ([1, 2, 9], [1, 2, 3, 7, 5]):
        with pytest.raises(CaptureError, match="turns 0 and 1 part"):
            stitch([first, turn(1, prompt, [8])], trim=1)
    context = stitch([first, turn(1, [1, 2, 3, 4, 5, 6, 7], [])])
    with pytest.raises(CaptureError, match=r"turns 0 and 1 part at position 6"):
        stitch([context, turn(2, [1, 2, 3, 4, 5, 6, 8], [9])], trim=5)
    # The dropped token is sampled again by the next turn: it is that one's.
    again = stitch([first, turn(1, [1, 2, 3, 4], [5, 6])], trim=1)
    assert again.token_ids == [4, 5, 6]
    assert again.logprobs[1:].tolist() == turn(1, [1, 2, 3, 4], [5, 6]).logprobs.tolist()


NOTHING = dict(lost=99, finish_reason="abort")


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("aborts", [1, 2])
@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("before", [0, 1])
def test_a_request_that_was_aborted_before_its_first_token_took_no_part(routed, aborts, stamped, before):
    turns = [turn(0, [1, 2], [3], weight_versions=(14,), row_versions=torch.full((3,), 14).int())][:before]
    prompt = [1, 2, 3, 4, 5]
    turns += [turn(n, prompt, [], **NOTHING) for n in range(1, 1 + aborts)]
    turns.append(turn(4, prompt, [6, 7]))
    if stamped:
        turns = [stamp_versions(t, [(0, t.weight_versions[0])]) for t in turns]
    if not routed:
        turns = [dataclasses.replace(t, routing=None) for t in turns]
    whole = stitch(turns)
    assert whole.weight_versions == (14,)
    assert whole.row_versions.tolist() == [14] * 6 + [-1]
    assert not whole.spans_versions
    kept = resolve_mixed_versions(Rollouts([whole], SPEC if routed else None), "drop")
    assert (len(kept), kept.mixed_versions) == (1, 0)
    nested = stitch([stitch(turns[:-1]), turns[-1]])
    assert (nested.weight_versions, nested.row_versions.tolist()) == ((14,), [14] * 6 + [-1])
    # With a token of the old weights it does.
    turns[-2] = turn(3, prompt, [6], lost=99)
    turns[-1] = turn(4, [*prompt, 6], [7])
    assert stitch(turns if routed else [dataclasses.replace(t, routing=None) for t in turns]).spans_versions
