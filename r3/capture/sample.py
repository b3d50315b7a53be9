"""One completion of the engine before its content is checked: one form for all of vLLM's interfaces."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r3.capture.kept_ids import KeptIds, kept_by_engine
from r3.capture.rows import row_array
from r3.errors import CaptureError
from r3.vllm_compat.capture import weight_versions


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """P prompt tokens, G sampled tokens.

    Attributes:
        prompt_ids: P token ids.
        token_ids: G token ids.
        logprobs: G log-probabilities of `token_ids`, nats.
        routed_experts: integer `[rows, decoder layers, K]`, None where the engine gave none.
        finish_reason: as vLLM gives it.
        kept: the ids that each token was sampled from; None where they were not asked for.
        versions: (first sampled token, version of the weights from it on), if the engine reports them (vLLM 0.32).
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    routed_experts: np.ndarray | None
    finish_reason: str | None
    kept: KeptIds | None = None
    versions: tuple[tuple[int, int], ...] = ()


def engine_sample(output: Any, completion: Any, routing: bool, sampling_mask: bool) -> Sample:
    """The sample of a `RequestOutput` and one of its `CompletionOutput`s; its routing and sets only if asked for.

    Raises:
        CaptureError: what is missing, or of another type than vLLM's.
    """
    token_ids = token_list(completion.token_ids, "token_ids")
    if completion.logprobs is None:
        raise CaptureError("no log-probabilities: ask for them with SamplingParams(logprobs=0)")
    if len(completion.logprobs) != len(token_ids):
        raise CaptureError(
            f"expected a log-probability of each of {len(token_ids)} sampled tokens, got {len(completion.logprobs)}"
        )
    return Sample(
        prompt_ids=token_list(output.prompt_token_ids, "prompt_token_ids"),
        token_ids=token_ids,
        logprobs=_sampled_logprobs(completion.logprobs, token_ids),
        routed_experts=row_array(completion.routed_experts) if routing else None,
        finish_reason=completion.finish_reason,
        kept=kept_by_engine(completion) if sampling_mask else None,
        versions=parse_version_spans(weight_versions(completion), getattr),
    )


def token_list(tokens: Any, name: str) -> list[int]:
    """Token ids as a list, from any sequence, array or tensor of integers.

    Raises:
        CaptureError: no sequence, or values other than integers from 0 up.
    """
    values = tokens.tolist() if isinstance(tokens, np.ndarray | torch.Tensor) else tokens
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise CaptureError(f"{name}: expected a list of integers, got {tokens!r:.80}")
    ids = list(values)
    if any(kind is not int for kind in set(map(type, ids))):
        ids = [int(token) if isinstance(token, np.integer) else token for token in ids]
    if set(map(type, ids)) <= {int} and min(ids, default=0) >= 0:
        return ids
    place, wrong = next((i, token) for i, token in enumerate(ids) if type(token) is not int or token < 0)
    raise CaptureError(f"{name}: expected a list of integers from 0 up, got {wrong!r:.80} at {place}")


def _sampled_logprobs(entries: Any, token_ids: list[int]) -> list[float]:
    """Of the token that was sampled at each position.

    vLLM gives a dictionary of objects a position; or, with `SamplingParams(flat_logprobs=True)`, one list for all
    positions, each of which begins with the sampled token's.
    """
    if hasattr(entries, "start_indices"):
        if entries.token_ids == token_ids:  # no more were asked for
            return entries.logprobs
        if [entries.token_ids[start] for start in entries.start_indices] == token_ids:
            return [entries.logprobs[start] for start in entries.start_indices]
    return [_logprob(i, token, entry) for i, (token, entry) in enumerate(zip(token_ids, entries, strict=True))]


def _logprob(place: int, token: int, entry: Any) -> float:
    try:
        return entry[token].logprob
    except (AttributeError, LookupError, TypeError) as error:
        raise CaptureError(
            f"sampled token {place}: expected its log-probability, of token {token}, got {entry!r:.80}"
        ) from error


def parse_version_spans(spans: Any, get: Callable[[Any, str], Any]) -> tuple[tuple[int, int], ...]:
    """(first sampled token, version) of each of vLLM's spans; empty if a label of a version is no number.

    The label is what the last sync gave the engine, "default" before one did.

    Args:
        spans: with version and start, or None if the engine reports none.
        get: a span's field by its name.

    Raises:
        CaptureError: spans of another form.
    """
    try:
        starts_and_labels = [(get(span, "start"), get(span, "version")) for span in spans or ()]
        if not all(label.isdecimal() for _, label in starts_and_labels):
            return ()
        return tuple((operator.index(start), int(label)) for start, label in starts_and_labels)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CaptureError(f"weight_versions: expected spans with version and start, got {spans!r:.80}") from error
