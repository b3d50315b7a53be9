"""vLLM outputs -> rollouts with token ids, log-probabilities and checked routing.

P prompt tokens, G generated tokens. vLLM returns P + G - 1 rows: the token that was sampled last was never fed back.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from r3.capture.rollout import Rollout, Rollouts
from r3.capture.rows import checked_rows
from r3.errors import CaptureError, summary
from r3.routing import RoutingSpec


def collect(
    outputs: Sequence[Any],
    spec: RoutingSpec | None,
    *,
    weight_version: int | None = None,
    prompt_start: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> Rollouts:
    """Turn vLLM's outputs into rollouts, or say which of them were not captured rightly.

    Args:
        outputs: `RequestOutput`s of `LLM.generate`, with `SamplingParams(logprobs=0)` or more.
        spec: the routing that the trainer's model can replay (`Replay.spec`): the outputs tell neither the number of
            experts nor a dense layer from a layer that always chose expert 0. None leaves routing out.
        weight_version: the version that the engine sampled with.
        prompt_start: the requests' `routed_experts_prompt_start`: the tokens before it have no rows.
        on_error: "skip" keeps the samples that are right, and says in `Rollouts.failed` what is wrong with the others.

    Raises:
        CaptureError: no routing, a wrong number of rows, layers or slots, a layer that was never captured, expert ids
            out of range or repeated in a row, or no log-probabilities. Names the samples. Also if no sample is right.
    """
    items: list[Rollout] = []
    problems: dict[int, str] = {}
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            place = len(items) + len(problems)
            try:
                items.append(_rollout(output, completion, index, spec, weight_version, prompt_start))
            except CaptureError as error:
                problems[place] = f"sample {place} (prompt {index}, completion {completion.index}): {error}"
    if problems and (on_error == "raise" or not items):
        raise CaptureError(f"{len(problems)} of {len(items) + len(problems)} samples:{summary(problems.values())}")
    if not items:
        raise CaptureError("outputs: expected at least one completion, got none")
    return Rollouts(items, spec, problems)


def _rollout(
    output: Any, completion: Any, index: int, spec: RoutingSpec | None, weight_version: int | None, prompt_start: int
) -> Rollout:
    prompt_ids, token_ids = list(output.prompt_token_ids), list(completion.token_ids)
    if completion.logprobs is None:
        raise CaptureError("no log-probabilities: ask for them with SamplingParams(logprobs=0)")
    logprobs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
    tokens = len(prompt_ids) + len(token_ids)
    routing = None
    if spec is not None:
        routing = checked_rows(
            completion.routed_experts,
            spec,
            tokens=tokens,
            start=prompt_start,
            complete=completion.finish_reason != "abort",
            weight_version=weight_version,
        )
    return Rollout(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        response_mask=torch.ones(len(token_ids), dtype=torch.bool),
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        routing=routing,
        finish_reason=completion.finish_reason,
        prompt_index=index,
        weight_versions=() if weight_version is None else (weight_version,),
        row_versions=None if weight_version is None else torch.full((tokens,), weight_version, dtype=torch.int32),
    )
