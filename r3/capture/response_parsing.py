"""Responses of vLLM's HTTP server -> samples.

Three routes, distinguished by their fields and not by a version: `/v1/completions` and `/v1/chat/completions` (objects
of the OpenAI client, dictionaries or JSON text), and `/inference/v1/generate` (dictionaries, JSON text, or the list of
the chunks of a finished stream). P prompt tokens, G sampled tokens.
"""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from r3.capture.kept_ids import UNKNOWN_LOGPROB, kept_by_server
from r3.capture.rows import decode_npy, row_array
from r3.capture.sample import Sample, parse_version_spans, token_list
from r3.errors import CaptureError

# Upper bound for one token: 512 layers of 32 slots of 4 bytes, and the array's header.
MAX_ROW_BYTES, HEADER_BYTES = 1 << 16, 1 << 12
# Of a stream's last chunk.
CARRIED = ("routed_experts", "finish_reason", "weight_versions", "sampling_mask")
LOST = "the connection or the server was lost"
REMEDY = "r3.capture.request_fields gives the fields that a request needs"

Read = Callable[[], Sample]


def http_samples(response: Any, *, routing: bool, sampling_mask: bool) -> list[tuple[int, Read]]:
    """For each choice, by ascending `index`: the index of its prompt in the response, and a function that reads it.

    Several prompts in one request of `/v1/completions` are distinguished by their token ids: equal neighbours count as
    one. The choices' routing and sets are looked at only if asked for.

    Raises:
        CaptureError: not a response of vLLM, an error that the server answered with, or a stream without a choice.
            The function that reads a choice raises it for faults of that choice alone.
    """
    streamed = isinstance(response, list | tuple)
    bodies = _chunks(response) if streamed else [_body(response)]
    prompt = _prompt(bodies)
    choices: dict[int, list[Any]] = {}  # of a stream, the parts of each
    for body in bodies:
        for place, part in enumerate(_choices(body)):
            choices.setdefault(_index(part, place), []).append(part)
    if streamed and not choices:
        raise CaptureError(f"the stream of {len(response)} chunks has no end: {LOST}")
    samples: list[tuple[int, Read]] = []
    place, before = -1, object()
    for index, parts in sorted(choices.items()):
        own = _prompt(parts)
        own = prompt if own is None else own
        # Comparing arrays gives an array, not a bool.
        equal = own is before or (isinstance(own, list) and isinstance(before, list) and own == before)
        place += not equal
        before = own
        # Several choices with one index cannot be told apart, but each counts as a sample.
        samples += [(place, partial(_sample, index, parts, own, routing, sampling_mask, streamed))] * (
            1 if streamed else len(parts)
        )
    return samples


def _prompt(parts: Sequence[Any]) -> Any:
    """The prompt's token ids, from the first of `parts` that has any."""
    prompts = (part.get("prompt_token_ids") for part in parts if isinstance(part, Mapping))
    return next((ids for ids in prompts if not (ids is None or (isinstance(ids, list) and not ids))), None)


STREAMED = (
    "a streamed response of an OpenAI route carries no routing: vLLM sends it only without streaming there. Ask with "
    "stream=False, or use /inference/v1/generate, which sends it with the last chunk"
)


def _body(response: Any) -> Mapping[str, Any]:
    """The response as a dictionary."""
    if hasattr(response, "model_dump"):  # pydantic, as the OpenAI client's; what OpenAI does not know is kept
        response = response.model_dump(warnings=False)
    elif isinstance(response, str | bytes):
        try:
            response = json.loads(response)
        except ValueError as error:
            raise CaptureError(f"expected a response in JSON, got {response[:80]!r}: {error}") from error
    if not isinstance(response, Mapping):
        raise CaptureError(
            "expected a RequestOutput, a response of the OpenAI client or of /inference/v1/generate as object, "
            f"dictionary or JSON text, the list of its chunks, or an exception; got {type(response).__name__}"
        )
    failure = response.get("error") or (response if response.get("object") == "error" else None)
    if failure:
        message = failure.get("message", failure) if isinstance(failure, Mapping) else failure
        raise CaptureError(f"the server answered with an error: {message}")
    return response


def _choices(body: Mapping[str, Any]) -> Sequence[Any]:
    choices = body.get("choices")
    if not isinstance(choices, list):
        raise CaptureError(f"expected a response with a list of choices, got one with {sorted(map(str, body))}")
    if any(isinstance(choice, Mapping) and "delta" in choice for choice in choices):
        raise CaptureError(STREAMED)
    return choices


def _index(part: Any, place: int) -> int:
    """The `index` of a choice; its place in the list if it has none, or none that is a number."""
    index = part.get("index") if isinstance(part, Mapping) else None
    return index if type(index) is int else place


def _chunks(lines: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The chunks of `/inference/v1/generate`, from dictionaries or `data: ` lines."""
    bodies = []
    for line in lines:
        chunk = line
        if isinstance(chunk, str | bytes):
            chunk = (chunk.decode() if isinstance(chunk, bytes) else chunk).removeprefix("data:").strip()
            if chunk in ("", "[DONE]"):
                continue
        body = _body(chunk)
        if "object" in body:  # the OpenAI routes' chunks alone have it
            raise CaptureError(STREAMED)
        bodies.append(body)
    return bodies


def _joined(index: int, parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One choice, joined from the parts of a stream."""
    choice: dict[str, Any] = {"token_ids": [], "logprobs": {"content": []}, "routed_experts": None, "streamed": True}
    for part in parts:
        choice["token_ids"] += part.get("token_ids") or []
        choice["logprobs"]["content"] += (part.get("logprobs") or {}).get("content") or []
        choice |= {name: part[name] for name in CARRIED if part.get(name) is not None}
    if "finish_reason" not in choice:
        raise CaptureError(f"the stream of {len(parts)} parts has no end for choices [{index}]: {LOST}")
    return choice


def _sample(
    index: int, parts: Sequence[Any], prompt: Any, routing: bool, sampling_mask: bool, streamed: bool
) -> Sample:
    wrong = [part for part in parts if not isinstance(part, Mapping)]
    if wrong:
        raise CaptureError(f"choices: expected objects, got {wrong[0]!r:.80}")
    if len(parts) > 1 and not streamed:
        raise CaptureError(f"{len(parts)} choices have the index {index}: which of them is which is not known")
    choice = _joined(index, parts) if streamed else parts[0]
    token_ids = _ids(choice.get("token_ids"), "token_ids of the choice")
    prompt_ids = _ids(prompt, "prompt_token_ids")
    rows = None
    if routing:
        rows = _rows(choice, len(prompt_ids) + len(token_ids))
    return Sample(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        logprobs=_logprobs(choice.get("logprobs"), token_ids),
        routed_experts=rows,
        finish_reason=choice.get("finish_reason"),
        kept=kept_by_server(choice) if sampling_mask else None,
        versions=parse_version_spans(choice.get("weight_versions"), operator.getitem),
    )


def _ids(ids: Any, name: str) -> list[int]:
    if ids is None:
        raise CaptureError(
            f"no {name}, and text may be tokenized otherwise. Ask with return_token_ids=True (in extra_body of the "
            f"OpenAI client); {REMEDY}. Where /inference/v1/generate does not know it, put the ids that were sent "
            "into the response as prompt_token_ids"
        )
    return token_list(ids, name)


def _logprobs(logprobs: Any, token_ids: list[int]) -> list[float]:
    if not logprobs and token_ids:
        raise CaptureError(
            "no log-probabilities: ask for them with logprobs=0 (completions), logprobs=True and top_logprobs=0 (chat) "
            f"or sampling_params.logprobs=0 (generate); {REMEDY}"
        )
    try:
        if "token_logprobs" in (logprobs or {}):
            tokens, values = list(logprobs["tokens"]), list(logprobs["token_logprobs"])
        else:
            entries = (logprobs or {}).get("content") or []
            tokens = [entry.get("token_id", entry.get("token")) for entry in entries]
            values = [entry["logprob"] for entry in entries]
        missing = [i for i, value in enumerate(values) if value is None or value <= UNKNOWN_LOGPROB]
    except (AttributeError, KeyError, TypeError) as error:
        raise CaptureError(
            f"logprobs: expected those of an OpenAI route or of generate, got {logprobs!r:.80}"
        ) from error
    if not len(values) == len(tokens) == len(token_ids):
        raise CaptureError(
            f"expected a log-probability of each of {len(token_ids)} sampled tokens, got {len(values)} of "
            f"{len(tokens)} tokens. echo=True would add those of the prompt"
        )
    if missing:
        raise CaptureError(f"the server does not know the log-probabilities of sampled tokens {missing[:16]}")
    for i, (token, sampled) in enumerate(zip(tokens, token_ids, strict=True)):
        known = token if isinstance(token, int) else _placeholder(token)
        if known is not None and known != sampled:
            raise CaptureError(f"sampled token {i} is {sampled}, but its log-probability is of token {known}")
    return values


def _placeholder(token: Any) -> int | None:
    """The id in `token_id:17`; None for text, which has no id."""
    number = str(token).removeprefix("token_id:")
    return int(number) if number != token and number.isdecimal() else None


def _rows(choice: Mapping[str, Any], tokens: int) -> np.ndarray | None:
    text = choice.get("routed_experts")
    if isinstance(text, list | np.ndarray):
        return row_array(text)
    if text is not None and not isinstance(text, str):
        raise CaptureError(f"routed_experts: expected base64 text, got {type(text).__name__}")
    if text is not None:
        return decode_npy(text, max_bytes=HEADER_BYTES + tokens * MAX_ROW_BYTES)
    if choice.get("finish_reason") == "abort":
        return None
    if "routed_experts" not in choice:
        raise CaptureError(
            f"no routing: the choice has no field routed_experts, only {sorted(choice)}. vLLM before 0.22 does not "
            "send it, a streamed response of an OpenAI route neither, and something between may have dropped it"
        )
    merged = ", and with the middleware without which vLLM until 0.30 loses the routing of some streams"
    raise CaptureError(
        "no routing: routed_experts is null. Start the server with --enable-return-routed-experts"
        f"{merged if 'streamed' in choice else ''} (r3.capture.server_args does)"
    )
