"""Agreement of an engine and the trainer's model on the same tokens: the engine's samples, scored by both.

B prompts, S positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from r3.capture import Rollouts, collect
from r3.capture.ask import ask, repeat_nats
from r3.diagnostics import LogprobSums, RoutingSums
from r3.diagnostics.initial_mismatch import EngineAgreement
from r3.replay import Replay, record
from r3.routing import RoutingSpec

PROMPTS, PROMPT_TOKENS, SAMPLED_TOKENS = 8, 32, 24
LARGEST_ID = 1024
"""Prompts are of small ids: rare tokens at the end of a vocabulary stand for images and the like."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An engine's answers.

    Attributes:
        rollouts: sampled answers, with routing if it is captured.
        repeat_nats: mean over tokens of how far a second answer at temperature 0 is from the first.
    """

    rollouts: Rollouts
    repeat_nats: float


def engine_agreement(
    engine: Any,
    replay: Replay,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = SAMPLED_TOKENS,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> EngineAgreement:
    """Sample from the engine, score its samples with the trainer's model, and compare.

    Call it when both should have the same weights: at the start, or after a sync.

    Args:
        engine: a `vllm.LLM`, or the URL of a server, started as `r3.capture.engine_kwargs` or `server_args` say.
        replay: what `attach` returned for the trainer's model, whole on this process.
        prompts: token ids; by default random ones.
        max_tokens: tokens that are sampled for each prompt.
        timeout_s, api_key: of a server.

    Raises:
        CaptureError: no answer, or one that cannot be used.

    Example:
        >>> import r3
        >>> engine_agreement(llm, r3.attach(model)).require()
    """
    prompts = prompts or probe_prompts(replay.model)
    answers = ask_twice(engine, prompts, replay.spec, max_tokens=max_tokens, timeout_s=timeout_s, api_key=api_key)
    metrics = score(replay.model, answers.rollouts)
    return EngineAgreement.from_metrics(family_of(replay.model), metrics, repeat_nats=answers.repeat_nats)


def ask_twice(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    spec: RoutingSpec | None,
    *,
    max_tokens: int = SAMPLED_TOKENS,
    temperature: float = 1.0,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> Answers:
    """Sample at `temperature`, to be scored, and twice at temperature 0, to be compared with each other.

    Raises:
        CaptureError: no answer, or one that cannot be used.
    """

    def sampled(heat: float) -> Rollouts:
        fields = {"temperature": heat, "max_tokens": max_tokens, "ignore_eos": True}
        asked = ask(engine, [(prompt, fields) for prompt in prompts], timeout_s=timeout_s, api_key=api_key)
        return collect(asked.responses, spec)

    return Answers(rollouts=sampled(temperature), repeat_nats=repeat_nats(sampled(0.0), sampled(0.0)))


@torch.no_grad()
def score(model: nn.Module, rollouts: Rollouts) -> dict[str, float]:
    """Flat metrics of the gap between `model` and `rollouts`, by the names of `metrics.jsonl`: live, and replayed if
    the rollouts have routing. Keeps the model's train or eval mode.

    Args:
        model: with replay attached, if the rollouts have routing; whole on this process.
        rollouts: sampled at temperature 1.
    """
    device = next(model.parameters()).device
    batch = rollouts.batch(0).to(device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    mask = batch.response_mask[:, 1:]

    def gap(logits: torch.Tensor) -> dict[str, float]:
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return LogprobSums.from_tensors(logprobs, batch.logprobs[:, 1:], mask).metrics()

    training = model.training
    model.eval()
    try:
        if batch.routing is None:
            return _named("logprob_diff/live", gap(model(**inputs).logits))
        with record(model) as recorder:
            live = gap(model(**inputs).logits)
        replayed = gap(model(**inputs, routed_experts=batch.routing).logits)
    finally:
        model.train(training)
    rows = RoutingSums.from_tensors(
        recorder.expert_ids, batch.routing.expert_ids, batch.routing.valid, layer_ids=batch.routing.layer_ids
    )
    return (
        _named("logprob_diff/live", live)
        | _named("logprob_diff/replayed", replayed)
        | _named("routing", rows.metrics())
    )


def probe_prompts(model: nn.Module, *, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random token ids, the same at every call, without the special tokens of the model's configuration."""
    configs: list[Any] = [model.config, model.config.get_text_config()]  # pyrefly: ignore
    special: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    ids = [i for i in range(3, min(configs[1].vocab_size, LARGEST_ID)) if i not in special]
    places = torch.randint(len(ids), (count, length), generator=torch.Generator().manual_seed(0))
    return [[ids[place] for place in row] for row in places.tolist()]


def family_of(model: nn.Module) -> str:
    return str(model.config.model_type)  # pyrefly: ignore


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
