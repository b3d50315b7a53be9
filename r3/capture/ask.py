"""A few requests to an engine in this process or to a server, for checks: prompts and sampling in, responses out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r3.capture.endpoint import Endpoint
from r3.capture.rollout import Rollout

Request = tuple[Sequence[int], dict[str, Any]]
"""Ids of a prompt, and sampling by the names that `SamplingParams` and the completions route share."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An engine's responses.

    Attributes:
        engine: `vllm.LLM`, or the URL.
        vllm_version: of the engine.
        model: as the engine calls it.
        responses: one for each request, as `r3.capture.collect` takes them.
    """

    engine: str
    vllm_version: str
    model: str
    responses: list[Any]


def ask(engine: Any, requests: Sequence[Request], *, timeout_s: float = 60.0, api_key: str | None = None) -> Asked:
    """Sampled tokens with their log-probabilities, and routing if the engine captures it.

    Args:
        engine: a `vllm.LLM`, or the URL of a server (`http://host:port`).
        requests: an engine in this process runs them in one batch, a server one after the other.
        timeout_s: of each of a server's answers; an engine in this process has no timeout.
        api_key: of a server that wants one.

    Raises:
        CaptureError: a server that does not answer, or answers with an error.
    """
    return (
        _ask_server(engine, requests, timeout_s, api_key) if isinstance(engine, str) else _ask_engine(engine, requests)
    )


def repeat_nats(first: Iterable[Rollout], second: Iterable[Rollout]) -> float:
    """Mean |difference| of log-probabilities between two greedy answers, up to and with the first token that differs.

    That token counts: the largest log-probabilities of two distributions are never further apart than the
    distributions are.
    """
    gaps = []
    for one, other in zip(first, second, strict=True):
        same = torch.tensor(one.token_ids) == torch.tensor(other.token_ids)
        compared = min(len(same), int(same.long().cumprod(0).sum()) + 1)
        gaps.append((one.logprobs - other.logprobs)[:compared].abs())
    return float(torch.cat(gaps).double().mean())


def _ask_engine(engine: Any, requests: Sequence[Request]) -> Asked:
    import vllm

    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
    sampling = [vllm.SamplingParams(logprobs=0, **fields) for _, fields in requests]
    return Asked(
        engine="vllm.LLM",
        vllm_version=vllm.__version__,
        model=engine.llm_engine.model_config.model,
        responses=engine.generate(prompts, sampling, use_tqdm=False),
    )


def _ask_server(url: str, requests: Sequence[Request], timeout_s: float, api_key: str | None) -> Asked:
    server = Endpoint(url=url, timeout_s=timeout_s, api_key=api_key)
    version, model = server.version(), server.model()
    shared = {"model": model, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return Asked(
        engine=url,
        vllm_version=version,
        model=model,
        responses=[
            server.ask("/v1/completions", shared | {"prompt": list(prompt)} | fields) for prompt, fields in requests
        ],
    )
