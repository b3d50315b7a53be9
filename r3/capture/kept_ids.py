"""The ids that each token was sampled from, out of vLLM's answers.

vLLM tells them in two ways. Log-probabilities of the sampling distribution (`logprobs_mode="processed_logprobs"`) are
minus infinity for ids that top-k, top-p or min-p took out: with as many of the largest as a set may have, and a few
more, the finite ones are the set. That depends on no release, route or device. And `return_sampling_mask`, from 0.30 in
its newer model runner, gives the sets themselves; they are taken where they are there.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from r3.errors import CaptureError

SPARE = 4
"""Log-probabilities asked for beyond top_k: vLLM keeps ids that tie with the last, and a set must not be cut."""

UNKNOWN_LOGPROB = -9999.0
"""What vLLM's server sends for minus infinity, and for a token whose log-probability it does not know."""


class KeptIds(NamedTuple):
    """The sets of G tokens: int64 sizes `[G]` and int32 ids of all, one set after the other."""

    sizes: np.ndarray
    ids: np.ndarray


def kept_by_engine(completion: Any) -> KeptIds:
    """From a `CompletionOutput`.

    Raises:
        CaptureError: neither sets nor log-probabilities of more than the sampled tokens, or a set that may be cut.
    """
    native = getattr(completion, "sampling_mask", None)
    if native is not None:
        return _of_lists(native.token_ids)
    entries = completion.logprobs
    if hasattr(entries, "start_indices"):
        # Empty lists, as of a request that was aborted at once, would become floats.
        starts, ends = (np.asarray(each, np.int64) for each in (entries.start_indices, entries.end_indices))
        ids, values = np.asarray(entries.token_ids, np.int32), np.asarray(entries.logprobs, np.float64)
        first = np.zeros(len(ids), bool)
        first[starts] = True  # the sampled token, which is among those that follow
        return _finite(ids[~first], values[~first], ends - starts - 1, -np.inf)
    pairs = [[(token, entry.logprob) for token, entry in place.items()] for place in entries]
    return _of_pairs(pairs, -np.inf)


def kept_by_server(choice: Mapping[str, Any]) -> KeptIds:
    """From a choice of `/inference/v1/generate` or of an OpenAI route, whose tokens come as ids.

    Raises:
        CaptureError: as `kept_by_engine`.
    """
    if choice.get("sampling_mask") is not None:
        return _of_lists(choice["sampling_mask"])
    logprobs = choice.get("logprobs") or {}
    try:
        if "top_logprobs" in logprobs:  # completions
            pairs = [[(_token_id(t), value) for t, value in place.items()] for place in logprobs["top_logprobs"]]
        else:
            places = [entry.get("top_logprobs") or [] for entry in logprobs["content"]]
            pairs = [[(_token_id(_said(top)), top["logprob"]) for top in place] for place in places]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"the ids that tokens were sampled from: expected top log-probabilities by token ids, got {logprobs!r:.80}"
        ) from error
    return _of_pairs(pairs, UNKNOWN_LOGPROB)


def _said(entry: Mapping[str, Any]) -> int | str:
    """The token: `/inference/v1/generate` says its id from vLLM 0.32, and `token_id:17` before, as the others do."""
    return entry["token_id"] if "token_id" in entry else entry["token"]


def _token_id(token: int | str) -> int:
    return token if isinstance(token, int) else int(token.removeprefix("token_id:"))


def _of_lists(sets: Any) -> KeptIds:
    try:
        return KeptIds(_sizes(sets), _array(chain.from_iterable(sets), np.int32))
    except (TypeError, ValueError, OverflowError) as error:
        raise CaptureError(f"sampling_mask: expected lists of token ids, got {sets!r:.80}") from error


def _of_pairs(pairs: Sequence[Sequence[tuple[int, float]]], taken_out: float) -> KeptIds:
    flat = list(chain.from_iterable(pairs))
    ids, values = _array((token for token, _ in flat), np.int32), _array((value for _, value in flat), np.float64)
    return _finite(ids, values, _sizes(pairs), taken_out)


def _finite(ids: np.ndarray, values: np.ndarray, asked: np.ndarray, taken_out: float) -> KeptIds:
    """Of the ids that were asked for, `asked[g]` for token g, those that were not taken out."""
    kept = values > taken_out
    tokens = np.repeat(np.arange(len(asked)), asked)
    sizes = np.bincount(tokens[kept], minlength=len(asked))
    cut = np.flatnonzero(sizes == asked)
    if len(cut):
        raise CaptureError(
            f"the ids that token {cut[0]} was sampled from ({len(cut)} of {len(asked)} tokens): expected some of the "
            f"{asked[cut[0]]} likeliest that were asked for to be taken out by top_k, top_p or min_p, got none: the "
            f"set may be larger. Ask for logprobs of top_k + {SPARE} (r3.capture.sampling_kwargs and request_fields "
            "do), of an engine with logprobs_mode=processed_logprobs and max_logprobs of as many"
        )
    return KeptIds(sizes, ids[kept])


def _sizes(parts: Sequence[Sequence[Any]]) -> np.ndarray:
    return _array((len(part) for part in parts), np.int64)


def _array(values: Iterable[Any], dtype: Any) -> np.ndarray:
    return np.fromiter(values, dtype)
