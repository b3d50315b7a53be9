"""What tests of the weight sync share: what an engine says under its weights, and the next version."""

import torch


def following(sync) -> int:
    return (sync.version or 0) + 1


def prompts(count: int = 8, length: int = 24) -> list[dict]:
    ids = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def greedy(engine, count: int = 4, tokens: int = 16) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities, from empty caches, one prompt at a time: results depend on what shares a batch."""
    from vllm import SamplingParams

    assert engine.reset_prefix_cache()
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    completions = [engine.generate(p, sampling, use_tqdm=False)[0].outputs[0] for p in prompts(count)]
    return [[(t, entry[t].logprob) for t, entry in zip(c.token_ids, c.logprobs, strict=True)] for c in completions]
