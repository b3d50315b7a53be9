"""Joined turns of a real engine against one prefill of the whole conversation."""

import statistics

import pytest
import torch
from routing_flips import FIRST_ULPS, assert_explained, explained_flips, router_logits

import r3
from r3 import RolloutRouting
from r3.capture import Rollout, collect, next_prompt_start, stitch

QUESTION = "\nState the final answer to the following arithmetic problem: {} + {} - {} =\n"


@pytest.fixture(scope="module")
def conversations(engine, demo_config):
    """The model, and three-turn conversations with prefix caching and `prompt_start`, each with a prefill of it all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import SamplingParams

    path = demo_config.trainer.policy.model.path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    spec = r3.attach(model).spec

    def generate(ids: list[int], tokens: int, start: int = 0) -> tuple[Rollout, int]:
        sampling = SamplingParams(
            seed=len(ids), max_tokens=tokens, logprobs=0, ignore_eos=True, routed_experts_prompt_start=start
        )
        outputs = engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        return collect(outputs, spec, prompt_start=start).items[0], outputs[0].num_cached_tokens

    made = []
    for number in range(4):
        assert engine.reset_prefix_cache()
        turns: list[Rollout] = []
        ids: list[int] = []
        for step in range(3):
            ids = ids + tokenizer(QUESTION.format(11 + number, 23 + step, number + step)).input_ids
            rollout, cached = generate(ids, 60, next_prompt_start(turns))
            turns.append(rollout)
            ids = rollout.prompt_ids + rollout.token_ids
        assert cached >= 128, "the last turn did not come from the prefix cache"
        assert engine.reset_prefix_cache()
        # One token more is sampled from the whole conversation, whose own rows are all but that token's.
        whole, cached = generate(ids, 1)
        assert not cached
        made.append((turns, whole))
    return model, made


def without_last(whole: Rollout) -> RolloutRouting:
    """Routing of a prefill without the token that it sampled, and without the row before it, which no turn has."""
    routing = whole.routing
    length = len(whole) - 1
    valid = routing.valid[:, :length] & (torch.arange(length) < length - 1)
    return RolloutRouting(routing.expert_ids[:, :length], valid, routing.layer_ids, routing.num_experts)


def moved(routing: RolloutRouting, target: slice, source: slice) -> RolloutRouting:
    """`routing` with the rows of `source` at `target`."""
    ids = routing.expert_ids.clone()
    ids[:, target] = routing.expert_ids[:, source]
    return RolloutRouting(ids, routing.valid, routing.layer_ids, routing.num_experts)


@pytest.mark.engine
def test_stitched_turns_are_one_prefill_of_the_whole_conversation(conversations, capsys):
    model, made = conversations
    for turns, whole in made:
        joined = stitch(turns)
        assert joined.prompt_ids + joined.token_ids == whole.prompt_ids
        assert sum(turn.routing.rows_valid for turn in turns) == joined.routing.rows_valid == len(joined) - 1
        expected = without_last(whole)
        logits = router_logits(model, whole.prompt_ids, expected)
        report = explained_flips(joined.routing, expected, logits)
        with capsys.disabled():
            print(f"\n{report}")
        assert_explained(report)


@pytest.mark.engine
def test_rows_that_are_wrong_are_not_explained(conversations):
    model, made = conversations
    margins = []
    for turns, whole in made:
        joined, expected = stitch(turns).routing, without_last(whole)
        logits = router_logits(model, whole.prompt_ids, expected)
        # All rows one position too late.
        rows = int(joined.rows_valid)
        shifted = explained_flips(moved(joined, slice(1, rows), slice(0, rows - 1)), expected, logits)
        assert shifted.share > 0.9
        assert shifted.first_margin_ulps > 10 * FIRST_ULPS
        # The row of a turn's last token as a copy of the last row of another token: two rows of hundreds.
        for turn in turns[:-1]:
            at = len(turn) - 1
            other = max(i for i in range(at) if whole.prompt_ids[i] != whole.prompt_ids[at])
            copied = explained_flips(moved(joined, slice(at, at + 1), slice(other, other + 1)), expected, logits)
            assert copied.worst[0][0] == at
            margins.append(copied.first_margin_ulps)
            # Tokens may be alike to the first layer, but not to all.
            with pytest.raises(AssertionError):
                assert_explained(copied)
    assert statistics.median(margins) > 4 * FIRST_ULPS, margins
