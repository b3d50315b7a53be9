"""vLLM's outputs and responses -> rollouts with token ids, log-probabilities and checked routing.

P prompt tokens, G generated tokens. vLLM returns P + G - 1 rows: the token that was sampled last was never fed back.
"""

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from r3.capture.response_parsing import Read, http_samples
from r3.capture.rollout import Rollout, Rollouts
from r3.capture.rows import checked_rows
from r3.capture.sample import Sample, engine_sample
from r3.capture.weight_versions import stamp_versions
from r3.errors import CaptureError, R3Error, summary
from r3.routing import RoutingSpec
from r3.sampling_mask import SamplingMask

# Tolerance for rounding: the log-probability of a certain token may be slightly above 0.
LARGEST_LOGPROB = 1e-3
SMALLEST_LOGPROB = float(np.finfo(np.float32).min)


def collect(
    responses: Sequence[Any],
    spec: RoutingSpec | None,
    *,
    weight_version: int | Sequence[int | None] | None = None,
    prompt_start: int | Sequence[int] = 0,
    sampling_mask: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Rollouts:
    """Turn vLLM's outputs into checked rollouts, or say which of them were not captured correctly.

    Args:
        responses: each of them one of
            - a `RequestOutput` of `LLM.generate`, with `SamplingParams(logprobs=0)` or more,
            - a response of the OpenAI client (completions or chat), or of `/inference/v1/generate`, as an object, a
              dictionary or JSON text, of a request with `r3.capture.request_fields`,
            - the list of all chunks of a stream of `/inference/v1/generate`,
            - an exception, or a future that is done: as `asyncio.gather(..., return_exceptions=True)` and executors
              give them. A failure is reported like a response that cannot be used.
        spec: the routing that the trainer's model can replay (`Replay.spec`): the outputs show neither the number of
            experts, nor whether a layer is dense or always chose expert 0. None leaves routing out.
        weight_version: the version that the engine sampled with, or one for each response. If the engine reports
            versions itself (vLLM 0.32, after a sync that labels its weights), the two must agree.
        prompt_start: the requests' `routed_experts_prompt_start`, or one for each response: the tokens before it have
            no rows. If a server ignores the field (the OpenAI routes of vLLM 0.26) and sends all rows, all are kept.
        sampling_mask: read the ids that each token was sampled from, which the requests asked for
            (`sampling_kwargs`, `request_fields`), and without which rollouts of top_p, top_k or min_p cannot be trained
            on.
        on_error: "skip" keeps the valid samples, and lists in `Rollouts.failed` what is wrong with the others.

    Raises:
        CaptureError: no routing, a wrong number of rows, layers or slots, a layer that was never captured, expert ids
            out of range or repeated in a row, no token ids or log-probabilities, other weights than were given, or a
            request that failed. Names the samples. Also if no sample is right, or there are not as many weight versions
            or starts as responses.

    Example:
        >>> logprobs = {"content": [{"token": "token_id:3", "logprob": -0.5}]}
        >>> choice = {"index": 0, "token_ids": [3], "logprobs": logprobs, "finish_reason": "stop"}
        >>> response = {"prompt_token_ids": [1, 2], "choices": [choice]}  # of /inference/v1/generate
        >>> collect([response], spec=None).items[0].logprobs
        tensor([-0.5000])
    """
    versions = _one_each("weight_version", weight_version, len(responses))
    starts = _one_each("prompt_start", prompt_start, len(responses))
    items: list[Rollout] = []
    problems: dict[int, str] = {}
    cause: Exception | None = None
    prompt = 0
    # Any fault of one sample, even an unforeseen one, concerns that sample alone: the others are kept.
    for response, version, start in zip(responses, versions, starts, strict=True):
        place, within = len(items) + len(problems), 0
        try:
            samples = _samples(response, routing=spec is not None, sampling_mask=sampling_mask)
        except Exception as error:
            cause, samples = cause or error, []
            problems[place] = f"sample {place} (prompt {prompt}): {_message_of(error)}"
        for number, (within, read) in enumerate(samples):
            place = len(items) + len(problems)
            try:
                items.append(_rollout(read(), prompt + within, spec, version, start or 0))
            except Exception as error:
                cause = cause or error
                problems[place] = (
                    f"sample {place} (prompt {prompt + within}, completion {number}): {_message_of(error)}"
                )
        prompt += within + 1
    if problems and (on_error == "raise" or not items):
        raise CaptureError(
            f"{len(problems)} of {len(items) + len(problems)} samples:{summary(problems.values())}"
        ) from cause
    if not items:
        raise CaptureError("responses: expected at least one completion, got none")
    return Rollouts(items, spec, problems)


def _message_of(error: Exception) -> str:
    return str(error) if isinstance(error, R3Error) else f"cannot be read: {type(error).__name__}: {error}"


def _samples(response: Any, *, routing: bool, sampling_mask: bool) -> list[tuple[int, Read]]:
    """For each completion: the index of its prompt in the response, and a function that reads the completion."""
    if hasattr(response, "done") and hasattr(response, "exception"):
        response = _result(response)
    if isinstance(response, BaseException):
        raise CaptureError(f"the request failed with {type(response).__name__}: {response}") from response
    if hasattr(response, "outputs") and hasattr(response, "prompt_token_ids"):
        if not isinstance(response.outputs, Sequence):
            raise CaptureError(f"outputs: expected a list of completions, got {response.outputs!r:.80}")
        return [
            (0, partial(engine_sample, response, completion, routing, sampling_mask)) for completion in response.outputs
        ]
    return http_samples(response, routing=routing, sampling_mask=sampling_mask)


def _result(future: Any) -> Any:
    if not future.done():
        raise CaptureError("the request is still running: wait for its future before its result is collected")
    if future.cancelled():
        raise CaptureError("the request was cancelled")
    failure = future.exception()
    return future.result() if failure is None else failure


def _rollout(
    sample: Sample, prompt_index: int, spec: RoutingSpec | None, weight_version: int | None, prompt_start: int
) -> Rollout:
    logprobs = _checked_logprobs(sample.logprobs)
    if not isinstance(sample.finish_reason, str | None):
        raise CaptureError(f"finish_reason: expected text or None, got {sample.finish_reason!r:.80}")
    if prompt_start < 0:
        raise CaptureError(f"prompt_start: expected 0 or more, got {prompt_start}")
    tokens = len(sample.prompt_ids) + len(sample.token_ids)
    routing = None
    if spec is not None:
        rows, complete = sample.routed_experts, sample.finish_reason != "abort"
        ignored = complete and rows is not None and rows.ndim == 3 and len(rows) == tokens - 1
        routing = checked_rows(
            rows,
            spec,
            tokens=tokens,
            start=0 if ignored else prompt_start,
            complete=complete,
            weight_version=weight_version,
        )
    rollout = Rollout(
        prompt_ids=sample.prompt_ids,
        token_ids=sample.token_ids,
        response_mask=torch.ones(len(sample.token_ids), dtype=torch.bool),
        logprobs=logprobs,
        routing=routing,
        finish_reason=sample.finish_reason,
        prompt_index=prompt_index,
        weight_versions=() if weight_version is None else (weight_version,),
        row_versions=None if weight_version is None else torch.full((tokens,), weight_version, dtype=torch.int32),
        sampling_mask=None
        if sample.kept is None
        else SamplingMask.of(*sample.kept, sample.token_ids, first=len(sample.prompt_ids)),
    )
    if not sample.versions:
        return rollout
    if weight_version is not None and {version for _, version in sample.versions} != {weight_version}:
        raise CaptureError(
            f"weight_version: expected {weight_version}, but the engine says that it sampled with "
            f"{', '.join(f'{version} from token {start}' for start, version in sample.versions)}"
        )
    return stamp_versions(rollout, sample.versions)


def _checked_logprobs(logprobs: Sequence[float]) -> Tensor:
    """float32 `[G]`, on the host."""
    if not set(map(type, logprobs)) <= {float}:  # before numpy, which reads lists in a list as more dimensions
        _require_logprobs(logprobs)
    values = np.array(logprobs, dtype=np.float64)
    if not values.min(initial=0.0) >= SMALLEST_LOGPROB or not values.max(initial=0.0) <= LARGEST_LOGPROB:
        _require_logprobs(logprobs)
    return torch.from_numpy(values.astype(np.float32))


def _require_logprobs(logprobs: Sequence[float]) -> None:
    for i, value in enumerate(logprobs):
        # No NaN is in the range.
        if not isinstance(value, Real) or not SMALLEST_LOGPROB <= value <= LARGEST_LOGPROB:
            raise CaptureError(
                f"sampled token {i}: expected a finite log-probability, at most 0, got {value!r:.80}. Start the engine "
                "with logprobs_mode=processed_logprobs (r3.capture.engine_kwargs and server_args do)"
            )


def _one_each(
    name: str, values: int | np.integer | Sequence[int | None] | None, responses: int
) -> Sequence[int | None]:
    """One value for each response, from one value for all or a sequence; numpy integers are accepted."""
    if values is None or isinstance(values, int | np.integer):
        return [None if values is None else int(values)] * responses
    if len(values) != responses:
        raise CaptureError(f"{name}: expected one for each of {responses} responses, got {len(values)}")
    return values
