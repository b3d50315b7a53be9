"""Families in which expert ids do not determine the router's result: refused by name."""

from r3.replay.families.family import Family

_CAPACITY = "tokens beyond an expert's capacity are dropped, by their order in the batch"

FAMILIES = {
    "PhimoeTopKRouter": Family(unsupported_reason="in training its weights come from a sampled mask (SparseMixer)"),
    "SwitchTransformersTop1Router": Family(unsupported_reason=_CAPACITY),
    "NllbMoeTop2Router": Family(unsupported_reason=_CAPACITY),
    "DiffusionGemmaTextRouter": Family(unsupported_reason="it denoises a block of tokens in several passes"),
    "DogeCDMoE": Family(unsupported_reason="experts are products of two keys, chosen by two top-k"),
}
