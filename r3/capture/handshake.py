"""A short exchange with an engine or a server that proves, before training, that capture works."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r3.capture.ask import ask, repeat_nats
from r3.capture.collect import collect
from r3.capture.rollout import Rollout
from r3.config import MOST_REPEAT_NATS
from r3.errors import CaptureError
from r3.routing import RoutingSpec

# Ids of every vocabulary, and fewer than a block of the prefix cache: no handshake hits the cache.
PROMPT_IDS = (3, 5, 7, 11, 13, 17, 19)
# Tolerance for the log-probability of a token that alone is allowed.
CERTAIN_NATS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """The result of a handshake.

    Attributes:
        engine: `vllm.LLM`, or the URL.
        vllm_version: of the engine.
        model: as the engine calls it.
        prompt_tokens, sampled_tokens: of the request.
        rows: rows of routing that were received and valid: all but the last token's.
        layers: decoder layers that have a router, of `decoder_layers`.
        experts, top_k: of the trainer's model, which the rows fit.
        repeat_nats: mean over the sampled tokens of how far a second answer is from the first.
        seconds: of the whole exchange.
    """

    engine: str
    vllm_version: str
    model: str
    prompt_tokens: int
    sampled_tokens: int
    rows: int
    layers: int
    decoder_layers: int
    experts: int
    top_k: int
    repeat_nats: float
    seconds: float


def handshake(
    engine: Any,
    spec: RoutingSpec,
    *,
    prompt_ids: Sequence[int] = PROMPT_IDS,
    max_tokens: int = 4,
    most_repeat_nats: float | None = MOST_REPEAT_NATS,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> Handshake:
    """Sample a few tokens greedily, and one that is forced, and check everything that training relies on.

    Token ids, log-probabilities and rows are there and consistent; rows are complete, distinct and in range; exactly
    the layers that the trainer replays were captured; the log-probabilities are those of the distribution that is
    sampled from (where one token alone is allowed, its log-probability is 0); the engine repeats itself.
    `r3.doctor.engine_agreement` checks whether it computes what the trainer computes.

    Args:
        engine: a `vllm.LLM`, or the URL of a server (`http://host:port`).
        spec: the routing that the trainer's model can replay (`Replay.spec`).
        prompt_ids: ids in the model's vocabulary.
        max_tokens: tokens to sample.
        most_repeat_nats: largest mean difference between two greedy answers, nats a token; None for any.
        timeout_s: of each of a server's answers; an engine in this process has no timeout.
        api_key: of a server that wants one.

    Raises:
        CaptureError: the first thing that is wrong, and what to do about it.

    Example:
        >>> import r3
        >>> handshake(llm, r3.attach(model).spec).layers
        8
    """
    started = time.perf_counter()
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    forced = greedy | {"temperature": 1.0, "max_tokens": 1, "allowed_token_ids": [prompt_ids[0]]}
    try:
        asked = ask(engine, [(prompt_ids, greedy), (prompt_ids, forced)], timeout_s=timeout_s, api_key=api_key)
        (sampled,) = collect(asked.responses[:1], spec)
        (certain,) = collect(asked.responses[1:], spec)
        _require(sampled, certain, list(prompt_ids), max_tokens, spec)
        repeated = collect(ask(engine, [(prompt_ids, greedy)], timeout_s=timeout_s, api_key=api_key).responses, spec)
        apart = repeat_nats([sampled], repeated)
        if most_repeat_nats is not None and not apart <= most_repeat_nats:
            raise CaptureError(
                f"two answers to the same prompt at temperature 0 are {apart:.2g} nats a token apart (bound "
                f"{most_repeat_nats:g}): the engine reads memory that nobody wrote, or its kernels race; try another "
                "attention backend, or another vLLM"
            )
    except CaptureError as error:
        raise CaptureError(f"handshake with {engine if isinstance(engine, str) else 'the engine'}: {error}") from error
    assert sampled.routing is not None
    return Handshake(
        engine=asked.engine,
        vllm_version=asked.vllm_version,
        model=asked.model,
        prompt_tokens=len(sampled.prompt_ids),
        sampled_tokens=len(sampled.token_ids),
        rows=sampled.routing.rows_valid,
        layers=len(spec.layer_ids),
        decoder_layers=spec.num_layers,
        experts=spec.num_experts,
        top_k=spec.top_k,
        repeat_nats=apart,
        seconds=time.perf_counter() - started,
    )


def _require(sampled: Rollout, certain: Rollout, prompt_ids: list[int], max_tokens: int, spec: RoutingSpec) -> None:
    """Check what `collect` cannot: the prompt that was sent, and that rows of one slot are not all 0."""
    if sampled.prompt_ids != prompt_ids:
        raise CaptureError(f"prompt_token_ids: expected those that were sent, {prompt_ids}, got {sampled.prompt_ids}")
    if len(sampled.token_ids) != max_tokens:  # the server may limit it
        raise CaptureError(f"expected {max_tokens} sampled tokens, got {len(sampled.token_ids)}")
    if certain.token_ids != prompt_ids[:1]:
        raise CaptureError(f"allowed_token_ids={prompt_ids[:1]}: expected that token, got {certain.token_ids}")
    if certain.logprobs.abs().max() > CERTAIN_NATS:
        raise CaptureError(
            "log-probabilities are not those of the distribution that is sampled from: of a token that alone was "
            f"allowed, expected 0, got {certain.logprobs[0]:.4f}. Start the engine with "
            "logprobs_mode=processed_logprobs (r3.capture.engine_kwargs and server_args do)"
        )
    routing = sampled.routing
    assert routing is not None
    if spec.top_k == 1 and not torch.any(routing.expert_ids):
        raise CaptureError(
            f"expert 0 in all {len(spec.layer_ids)} layers for all {routing.rows_valid} tokens: nothing was captured. "
            "vLLM's CPU build 0.30 does this when it compiles: use enforce_eager=True; so do monolithic MoE kernels"
        )
