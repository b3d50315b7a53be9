"""One completion as the engine gave it, before its content is checked: the same for every way to ask vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r3.errors import CaptureError


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """P prompt tokens, G sampled tokens.

    Attributes:
        prompt_ids: P token ids.
        token_ids: G token ids.
        logprobs: G log-probabilities of `token_ids`, nats.
        routed_experts: integer `[rows, decoder layers, K]`, None where the engine gave none.
        finish_reason: as vLLM gives it.
        versions: (first sampled token, version of the weights from it on), where the engine tells (vLLM 0.32).
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    routed_experts: np.ndarray | None
    finish_reason: str | None
    versions: tuple[tuple[int, int], ...] = ()


def engine_sample(output: Any, completion: Any) -> Sample:
    """Of a `RequestOutput` and one of its `CompletionOutput`s.

    Raises:
        CaptureError: no log-probability of a sampled token.
    """
    token_ids = list(completion.token_ids)
    if completion.logprobs is None:
        raise CaptureError("no log-probabilities: ask for them with SamplingParams(logprobs=0)")
    if len(completion.logprobs) != len(token_ids):
        raise CaptureError(
            f"expected a log-probability of each of {len(token_ids)} sampled tokens, got {len(completion.logprobs)}"
        )
    return Sample(
        prompt_ids=list(output.prompt_token_ids),
        token_ids=token_ids,
        logprobs=[entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)],
        routed_experts=completion.routed_experts,
        finish_reason=completion.finish_reason,
        versions=told_versions(
            [(span.version, span.start) for span in getattr(completion, "weight_versions", None) or ()]
        ),
    )


def told_versions(spans: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...]:
    """(first sampled token, version) of vLLM's (label, first sampled token); nothing if a label is no number.

    The label is what the last sync gave the engine, "default" before one did.
    """
    if not all(label.isdecimal() for label, _ in spans):
        return ()
    return tuple((start, int(label)) for label, start in spans)
