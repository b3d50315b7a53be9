"""One request to an engine: a prompt, and some of its samples."""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What an engine has answered to a request.

    Attributes:
        response: as `r3.capture.collect` takes it.
        engine: its name.
        versions: of the weights when the request was sent, and when it was answered.
    """

    response: Any
    engine: str
    versions: tuple[int, int]


class Request:
    """A prompt and `samples` of its completions, which one engine samples together.

    Args:
        prompt_ids: token ids.
        sampling: by the names of `vllm.SamplingParams`, with `n` and, where draws are to be repeatable, `seed`.
        conversation: what this request is a turn of; None for a request by itself.
        answer: gets the `Answer`, or the exception; once.
        most_tokens: that are sampled if nothing is said in `sampling`.

    Attributes:
        tokens: that an engine has to compute for it at most: of the prompt, which samples share, and sampled ones.
        attempt: counts the engines that it was sent to.
        causes: why earlier ones did not answer.
        sent_at: time of the event loop at which it was sent last.
        version: of the weights then.
    """

    __slots__ = (
        "answer",
        "attempt",
        "causes",
        "conversation",
        "prompt_ids",
        "samples",
        "sampling",
        "sent_at",
        "tokens",
        "version",
    )

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: dict[str, Any],
        answer: asyncio.Future,
        *,
        conversation: Hashable | None = None,
        most_tokens: int = 512,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.answer = answer
        self.conversation = conversation
        self.samples: int = sampling.get("n", 1)
        self.tokens: int = len(prompt_ids) + self.samples * (sampling.get("max_tokens") or most_tokens)
        self.attempt = 0
        self.causes: list[str] = []
        self.sent_at = 0.0
        self.version = 0
