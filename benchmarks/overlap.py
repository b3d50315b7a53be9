"""Log-probability gap under replay when a token's row is taken from the first or from the last turn that captured it.

    python -m benchmarks.overlap                     # the demo model, one request at a time
    python -m benchmarks.overlap --max-num-seqs 80   # all conversations in one batch

One line of JSON. Conversations of three turns by token ids, whose prefills are computed anew (no prefix cache between
turns, no `prompt_start`), so that every row but the last turn's comes again. k3 in nats, by turn, over sampled tokens.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "chain_sum_moe"
TURNS, SAMPLED = 3, 80
QUESTION = "State the final answer to the following arithmetic problem: {} + {} - {} =\n"


def question(tokenizer: Any, conversation: int, turn: int) -> list[int]:
    terms = 7 * conversation + 13 * turn, 11 * conversation + 5 * turn, 3 * conversation + turn
    return tokenizer(QUESTION.format(*(10 + term % 90 for term in terms))).input_ids


def converse(engine: Any, tokenizer: Any, spec: Any, count: int) -> list[list[Any]]:
    """`count` conversations, as lists of turns."""
    from vllm import SamplingParams

    from r3.capture import collect

    sampling = SamplingParams(temperature=1.0, max_tokens=SAMPLED, logprobs=0, ignore_eos=True)
    turns: list[list[Any]] = [[] for _ in range(count)]
    prompts = [question(tokenizer, i, 0) for i in range(count)]
    for turn in range(1, TURNS + 1):
        if not engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: rows would not be computed anew")
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        for i, rollout in enumerate(collect(outputs, spec)):
            turns[i].append(rollout)
            prompts[i] = rollout.prompt_ids + rollout.token_ids + question(tokenizer, i, turn)
    return turns


def logprobs(model: Any, ids: list[int], routing: Any) -> Tensor:
    """float32 `[S - 1]`, of each token but the first; logits in float32, as the engine's."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), routed_experts=routing, use_cache=False).logits
    return logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def k3_by_turn(model: Any, conversations: list[list[Any]], overlap: Any) -> list[float]:
    from r3.capture import stitch
    from r3.diagnostics import compare_logprobs

    train, rollout, turn_of = [], [], []
    for turns in conversations:
        joined = stitch(turns, overlap=overlap)
        prompt = len(joined.prompt_ids)
        train.append(logprobs(model, joined.prompt_ids + joined.token_ids, joined.routing)[prompt - 1 :])
        rollout.append(joined.logprobs)
        number = torch.full((len(joined.token_ids),), -1)
        for i, turn in enumerate(turns):
            number[len(turn.prompt_ids) - prompt : len(turn) - prompt] = i
        turn_of.append(number)
    a, b, where = (torch.cat(parts)[None] for parts in (train, rollout, turn_of))
    return [compare_logprobs(a, b, where == i)["k3"] for i in range(TURNS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--conversations", type=int, default=80)
    parser.add_argument("--max-num-seqs", type=int, default=1)
    chosen = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import r3
    from r3.capture import compare_overlap, running_engine

    settings = [f"generator.inference_engine.max_num_seqs={chosen.max_num_seqs}"]
    config = r3.R3Config.from_overrides(settings, {"trainer.policy.model.path": chosen.model})
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16).eval()
    spec = r3.attach(model).spec
    head = model.get_output_embeddings().float()
    head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    with running_engine(config) as engine:
        conversations = converse(engine, tokenizer, spec, chosen.conversations)
    reports = [compare_overlap(turns) for turns in conversations]
    result = {
        "conversations": chosen.conversations,
        "max_num_seqs": chosen.max_num_seqs,
        "rows_captured_again": sum(report.rows for report in reports),
        "differing_rows": sum(report.differing_rows for report in reports),
        "differing_by_layer": [sum(c) for c in zip(*(r.differing_by_layer for r in reports), strict=True)],
        "k3_by_turn": {name: k3_by_turn(model, conversations, name) for name in ("earlier", "later")},
    }
    print(json.dumps(result | machine(torch.device("cpu"))))


if __name__ == "__main__":
    main()
