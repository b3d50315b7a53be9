"""Batches of a step, made up."""

import torch

import r3
from r3.capture import RolloutBatch


def made_batch(generator: torch.Generator) -> RolloutBatch:
    ids = torch.randint(2, 300, (3, 12), generator=generator)
    attention = torch.ones(3, 12, dtype=torch.int64)
    attention[1, 9:] = 0
    response = attention.bool()
    response[:, :5] = False
    experts = torch.rand(3, 12, 8, 32, generator=generator).argsort(-1)[..., :4]
    valid = attention.bool()
    valid[:, 8] = False
    return RolloutBatch(
        input_ids=ids,
        attention_mask=attention,
        response_mask=response,
        logprobs=torch.zeros(3, 12),
        routing=r3.RolloutRouting(experts, valid, tuple(range(8)), 32),
    )
