"""Which of the engine's answers a sequence of TRL's is made of, and where its rows are in TRL's padded ones."""

from dataclasses import replace

import pytest
import torch

from r3 import CaptureError
from r3.capture import Rollout, SamplingMask
from r3.routing import RoutingSpec, routing_of
from trainer_hooks.trl.sequences import Turns, row_numbers

SPEC = RoutingSpec(layer_ids=(0, 1), num_layers=2, num_experts=64, top_k=2)


def of_token(token: int, layer: int) -> list[int]:
    """Experts that tell which token they are of."""
    return [token % 32, 32 + (token + layer) % 32]


def rollout(prompt: list[int], tokens: list[int]) -> Rollout:
    ids = prompt + tokens
    rows = torch.tensor([[of_token(token, layer) for layer in (0, 1)] for token in ids])
    rows[-1] = -1  # never fed back
    return Rollout(
        prompt_ids=prompt,
        token_ids=tokens,
        response_mask=torch.ones(len(tokens), dtype=torch.bool),
        logprobs=torch.zeros(len(tokens)),
        routing=routing_of(SPEC, rows[None]),
        finish_reason="stop",
    )


def padded(sequences: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, int]:
    """TRL's rows: prompts padded on the left, completions on the right, in steps of 4."""
    left = -(-max(len(prompt) for prompt, _ in sequences) // 4) * 4
    right = -(-max(len(tokens) for _, tokens in sequences) // 4) * 4
    rows = torch.zeros(len(sequences), left + right, dtype=torch.int64)
    for row, (prompt, tokens) in zip(rows, sequences, strict=True):
        row[left - len(prompt) : left + len(tokens)] = torch.tensor(prompt + tokens)
    return rows, left


def check(turns: Turns, sequences: list[tuple[list[int], list[int]]], without: set[tuple[int, int]] = frozenset()):
    """Each token has its own row, but for the last of each sequence and those in `without` (sequence, token)."""
    made = turns.joined(*map(list, zip(*sequences, strict=True)))
    rows, columns = padded(sequences)
    found = made.placed(rows, columns)
    for b, (prompt, tokens) in enumerate(sequences):
        ids, start = prompt + tokens, columns - len(prompt)
        for t, token in enumerate(ids):
            row = found.routing.expert_ids[b, start + t].tolist()
            has = t < len(ids) - 1 and (b, t) not in without
            assert found.routing.valid[b, start + t] == has
            assert not has or row == [of_token(token, layer) for layer in (0, 1)]
    assert found.routing.rows_valid == sum(len(p) + len(c) - 1 for p, c in sequences) - len(without)


def test_rows_are_placed_by_their_tokens():
    sequences = [([5, 6, 7], [8, 9]), ([5], [1, 2, 3, 4, 5]), ([7] * 6, [1])]
    turns = Turns()
    turns.add([rollout(*each) for each in sequences])
    check(turns, sequences)


def test_sets_are_placed_by_their_tokens_and_go_with_their_rows():
    """A set is a token and the next one; those of a prompt and of a tool's answer have none."""
    turns = Turns()
    turns.add([with_sets(rollout([5, 6, 7], [8, 9])), with_sets(rollout([5], [1, 2]))])
    turns.add([with_sets(rollout([5, 1, 2, 20, 21], [3]))])
    sequences = [([5, 6, 7], [8, 9]), ([5], [1, 2, 20, 21, 3])]
    made = turns.joined(*map(list, zip(*sequences, strict=True)))
    assert made.set_sizes.tolist() == [2] * 5
    rows, columns = padded(sequences)
    found = made.placed(rows, columns).select([1, 0])
    sampled = [{1, 2, 3}, {8, 9}]
    for row, mask, own in zip(rows.flip(0), (found.sampling_mask.select([b]) for b in (0, 1)), sampled, strict=True):
        sets = mask.token_ids.split(mask.sizes[0].tolist())
        assert [ids.tolist() for ids in sets] == [[t, t + 1] if t in own else [] for t in row.tolist()]


def with_sets(made: Rollout) -> Rollout:
    sets = [token + more for token in made.token_ids for more in (0, 1)]
    mask = SamplingMask.of([2] * len(made.token_ids), sets, made.token_ids, first=len(made.prompt_ids))
    return replace(made, sampling_mask=mask)


def test_turns_with_tools_are_joined_where_they_belong():
    """Only the second and the last called; the same prompt and answer twice; the last turn is cut."""
    turns = Turns()
    turns.add([rollout([1, 2], [3]), rollout([1, 2], [4]), rollout([9], [4]), rollout([9], [4])])
    turns.add([rollout([1, 2, 4, 20, 21], [5, 6]), rollout([9, 4, 30], [7, 8, 9])])
    turns.add([rollout([1, 2, 4, 20, 21, 5, 6, 22], [10])])
    check(
        turns,
        [([1, 2], [3]), ([1, 2], [4, 20, 21, 5, 6, 22, 10]), ([9], [4, 30, 7]), ([9], [4])],
    )


def test_a_last_turn_that_is_cut_to_nothing_still_gives_the_tools_rows():
    turns = Turns()
    turns.add([rollout([1], [2])])
    turns.add([rollout([1, 2, 30, 31], [5])])
    check(turns, [([1], [2, 30, 31])])


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([([1], [2, 7])], "the tokens that the engine read and sampled"),
        ([([1], [2]), ([1], [2])], "a first turn of each of 2 sequences, got 1"),
    ],
)
def test_other_tokens_than_the_engines_are_refused(sequences, message):
    turns = Turns()
    turns.add([rollout([1], [2, 3])])
    with pytest.raises(CaptureError, match=message):
        turns.joined(*map(list, zip(*sequences, strict=True)))


def test_a_turn_of_no_sequence_is_refused():
    turns = Turns()
    turns.add([rollout([1], [2])])
    turns.add([rollout([1, 3, 4], [5])])
    with pytest.raises(CaptureError, match="it continues none"):
        turns.joined([[1]], [[2]])


def test_rows_that_are_laid_out_otherwise_are_refused():
    turns = Turns()
    turns.add([rollout([1, 2], [3, 4])])
    made = turns.joined([[1, 2]], [[3, 4]])
    with pytest.raises(CaptureError, match="lays its rows out in another way"):
        made.placed(torch.tensor([[1, 2, 0, 0, 3, 4]]), 4)  # prompts padded on the right
    with pytest.raises(CaptureError, match="rows of 1 sequences, got 2"):
        made.placed(torch.zeros(2, 4, dtype=torch.int64), 2)


def test_numbers_of_rows_are_what_trl_shuffles():
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    batch = {"prompt_ids": torch.arange(8)[:, None], "routing_rows": row_numbers(3, 8)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 2)
    for part in parts:
        assert torch.equal(part["routing_rows"][:, 1], part["prompt_ids"][:, 0])
        assert (part["routing_rows"][:, 0] == 3).all()
