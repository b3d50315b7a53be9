"""Prompts -> requests, and answers -> rollouts in the order of the prompts."""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from r3.capture import Rollout, Rollouts, collect
from r3.capture.engine import is_truncated
from r3.errors import CaptureError
from r3.pool.request import Answer
from r3.routing import RoutingSpec

_ENOUGH = 2  # requests an engine, to keep all of them at work


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one prompt that one engine samples together.

    Attributes:
        prompt: its place among the prompts.
        sampling: by the names of `vllm.SamplingParams`.
        conversation: what the prompt is a turn of.
    """

    prompt: int
    sampling: dict[str, Any]
    conversation: Hashable | None


def parts_of(
    prompts: Sequence[Sequence[int]],
    sampling: Mapping[str, Any],
    *,
    engines: int,
    seed: int | None = None,
    conversations: Sequence[Hashable] | None = None,
) -> list[Part]:
    """How the samples of `prompts` are spread, in the order of the prompts and of their samples.

    The samples of a prompt stay together, so that it is computed once. They are spread if there are fewer than two
    prompts an engine, and only as far as a part still samples as many tokens as its prompt has.

    Args:
        sampling: with `n` samples of each prompt.
        engines: how many serve.
        seed: makes draws repeatable: sample s of prompt p has the same random numbers wherever it is sampled.
        conversations: what each prompt is a turn of: all its samples stay together.

    Raises:
        CaptureError: no prompts, an empty one, or not as many conversations.
    """
    if not prompts or not all(map(len, prompts)):
        empty = [place for place, prompt in enumerate(prompts) if not len(prompt)]
        raise CaptureError(
            f"prompts: expected at least one, with token ids; without are {empty[:16]} of {len(prompts)}"
        )
    if conversations is not None and len(conversations) != len(prompts):
        raise CaptureError(f"conversations: expected one for each of {len(prompts)} prompts, got {len(conversations)}")
    samples: int = sampling.get("n", 1)
    parts = []
    for place, prompt in enumerate(prompts):
        count = 1 if conversations is not None else _spread(len(prompts), len(prompt), samples, sampling, engines)
        first = 0
        for number in range(count):
            own = samples // count + (number < samples % count)
            seeded = {} if seed is None else {"seed": _seed_of(seed, place) + first}
            parts.append(
                Part(
                    prompt=place,
                    sampling={**sampling, "n": own, **seeded},
                    conversation=None if conversations is None else conversations[place],
                )
            )
            first += own
    return parts


def rollouts_of(
    parts: Sequence[Part],
    answers: Sequence[Answer | BaseException],
    spec: RoutingSpec | None,
    *,
    prompt_start: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> Rollouts:
    """`collect` of all answers: rollouts in the order of `parts`, each with its engine and the weights that it saw.

    Raises:
        CaptureError: as `collect`.
    """
    responses = [answer if isinstance(answer, BaseException) else answer.response for answer in answers]
    versions = [None if isinstance(answer, BaseException) else _one(answer.versions) for answer in answers]
    rollouts = collect(
        responses,
        spec,
        weight_version=versions,
        prompt_start=prompt_start,
        sampling_mask=is_truncated(parts[0].sampling),
        on_error=on_error,
    )
    items = [_labelled(item, parts[item.prompt_index], answers[item.prompt_index]) for item in rollouts]
    return replace(rollouts, items=items)


def _labelled(item: Rollout, part: Part, answer: Answer | BaseException) -> Rollout:
    assert isinstance(answer, Answer)
    # The weights changed while the engine had the request, and it does not say when.
    versions = item.weight_versions or tuple(sorted(set(answer.versions)))
    return replace(item, prompt_index=part.prompt, engine=answer.engine, weight_versions=versions)


def _one(versions: tuple[int, int]) -> int | None:
    return versions[0] if versions[0] == versions[1] else None


def _spread(prompts: int, length: int, samples: int, sampling: Mapping[str, Any], engines: int) -> int:
    """In how many parts the samples of a prompt of `length` tokens go."""
    wanted = -(-_ENOUGH * engines // prompts)
    affordable = samples * (sampling.get("max_tokens") or 1) // length
    return max(1, min(samples, wanted, affordable))


def _seed_of(seed: int, prompt: int) -> int:
    """Below 2^62. vLLM adds the number of a sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest(), "little") >> 2
