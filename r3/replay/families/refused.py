"""Families in which expert ids do not determine the router's result: refused by name."""

from r3.replay.families.family import Family

_CAPACITY = "tokens beyond an expert's capacity are dropped, by their order in the batch"

FAMILIES = {
    "PhimoeTopKRouter": Family(refused="in training its weights come from a sampled mask (SparseMixer), not from ids"),
    "SwitchTransformersTop1Router": Family(refused=_CAPACITY),
    "NllbMoeTop2Router": Family(refused=_CAPACITY),
    "DiffusionGemmaTextRouter": Family(refused="it denoises a block of tokens in several passes, each routed anew"),
    "DogeCDMoE": Family(refused="experts are products of two keys, chosen by two top-k, and routed across tokens"),
}
