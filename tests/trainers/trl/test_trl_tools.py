"""TRL's own loop of tools over a real engine: several turns, answers of tools between them, a cut at the end."""

import pytest
import torch
import trl.trainer.grpo_trainer as grpo
from places import DEMO_MODEL
from transformers import AutoTokenizer
from trl_runs import trainer

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_engine")]

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<|end|>"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def double(value: int) -> int:
    """Twice a number.

    Args:
        value: the number.

    Returns:
        Twice that.
    """
    return 2 * value


def called(tokenizer, ids, prefix=None, tools=None):
    """Stands in for the parser of a model that was trained to call tools: every other answer calls one."""
    calls = [{"type": "function", "function": {"name": "double", "arguments": {"value": len(ids)}}}]
    return {"role": "assistant", "content": tokenizer.decode(ids)} | ({"tool_calls": calls} if sum(ids) % 2 else {})


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "top_p": 0.95}], ids=["whole", "cut"])
def test_turns_with_tools_are_replayed(tmp_path, monkeypatch, sampling):
    from datasets import Dataset

    monkeypatch.setattr(grpo, "parse_response", called)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = "any"
    prompts = [[{"role": "user", "content": f"{a}+{b}="}] for a in range(10, 14) for b in range(10, 14)]
    made = trainer(
        tmp_path,
        given={
            "train_dataset": Dataset.from_dict({"prompt": prompts}),
            "processing_class": tokenizer,
            "tools": [double],
        },
        max_completion_length=40,
        generation_kwargs={"max_tokens": 9},
        per_device_train_batch_size=8,
        max_tool_calling_iterations=3,
        temperature=1.2,
        **sampling,
    )
    steps = []
    place = made._of_generation

    def watched(input_ids, columns):
        rows = place(input_ids, columns)
        steps.append((made._turns._turns, rows.routing))
        return rows

    monkeypatch.setattr(made, "_of_generation", watched)
    made._look = lambda *_: None
    made.train()
    log = [line for line in made.state.log_history if "loss" in line]
    assert max(line["tools/call_frequency"] for line in log) > 0.3
    turns, routing = steps[0]
    assert len(turns) > 2
    assert len(turns[1]) < len(turns[0])  # some only
    # Only the last token of a sequence has no row: those of tools and of earlier turns have theirs.
    assert all(line["routing/replayed_frac"] > 0.93 for line in log)
    firsts = {tuple(r.prompt_ids + r.token_ids): r.routing.expert_ids[0] for r in turns[0]}
    for b in range(len(turns[0])):
        rollout = turns[0][b]
        ids = tuple(rollout.prompt_ids + rollout.token_ids)
        start = int(routing.captured[b].int().argmax())
        kept = len(ids) - 1
        assert torch.equal(routing.expert_ids[b, start : start + kept], firsts[ids][:kept])
    assert min(line["sampling/sampling_logp_difference/mean"] for line in log) < 0.02
