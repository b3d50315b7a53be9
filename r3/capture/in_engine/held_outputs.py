"""What an engine has sampled for a request and not sent yet, joined into the message that is sent next.

Imported in the engine's process alone.
"""

from operator import attrgetter
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput

HELD = ("request_id", "new_token_ids", "new_logprobs")
_finish_reason = attrgetter("finish_reason")  # apart, since one of them is 0
_others = attrgetter(*(name for name in EngineCoreOutput.__struct_fields__ if name not in (*HELD, "finish_reason")))


class HeldOutputs:
    """Tokens and log-probabilities of one request, in the order in which they were sampled."""

    __slots__ = ("_logprobs", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[Any] = []

    def hold(self, output: EngineCoreOutput) -> bool:
        """Keep an output that says no more than tokens and log-probabilities; False for any other."""
        if _finish_reason(output) is not None or any(_others(output)):
            return False
        self._token_ids += output.new_token_ids
        if output.new_logprobs is not None:
            self._logprobs.append(output.new_logprobs)
        return True

    def release(self, output: EngineCoreOutput) -> None:
        """Put what is held in front of `output`, and forget it."""
        if not self._token_ids:
            return
        output.new_token_ids = [*self._token_ids, *output.new_token_ids]
        if output.new_logprobs is not None:
            self._logprobs.append(output.new_logprobs)
        if self._logprobs:
            output.new_logprobs = _joined(self._logprobs)
        self._token_ids, self._logprobs = [], []


def _joined(parts: list[Any]) -> Any:
    """vLLM's log-probabilities of consecutive tokens as one: ids and log-probabilities `[n, k]`, ranks `[n]`.

    A step's are as wide as its request that wants most: cut to the narrowest, which has all that this request wants.
    """
    ids, logprobs, ranks, _ = zip(*parts, strict=True)
    width = min(each.shape[1] for each in ids)
    wide = (np.concatenate([each[:, :width] for each in of]) for of in (ids, logprobs))
    return type(parts[0])(*wide, np.concatenate(ranks), None)
