"""Routing for the forwards of a model that a trainer calls without a word of it."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError
from r3.replay import Replay
from r3.replay.context import KEYWORD, tokens_of
from r3.routing import RolloutRouting


class RoutingFeed:
    """Gives the next forwards of an attached model the routing of their samples, in order.

    A trainer calls its model somewhere inside a method of its own. Around a call of that method, `rows` says what the
    forwards in it are of: the first of n samples gets the first n, and so on. All others (reference, critic,
    evaluation, generation) get nothing, and are live.

    Args:
        replay: of the model, before or after it is wrapped.
        required: raise in a training forward with gradients outside `rows`.
    """

    def __init__(self, replay: Replay, *, required: bool = True) -> None:
        self.replay = replay
        self.required = required
        self._given: deque[RolloutRouting] | None = None
        # Before the hook of replay itself, which was there before and so runs after it.
        self._hook = replay.model.register_forward_pre_hook(self._add, with_kwargs=True, prepend=True)

    def detach(self) -> None:
        """Give nothing from here on. Replay stays attached."""
        self._hook.remove()

    @contextlib.contextmanager
    def rows(self, *routing: RolloutRouting) -> Iterator[None]:
        """Context in which each forward of n samples takes the next n of `routing`, and all of them are taken.

        Args:
            routing: `[B, S, L, K]` each; the forwards' `input_ids` are `[n, S]`. No forward takes from two of them.

        Raises:
            ReplayError: inside another `rows`; a forward finds none left, or too few; some are left at the end.
            RoutingError: a forward of another length S.
        """
        if self._given is not None:
            raise ReplayError("routing for the next forwards: expected none, got some inside another")
        self._given = deque(routing)
        try:
            yield
            if left := sum(len(part.expert_ids) for part in self._given):
                raise ReplayError(
                    f"expected forwards of all {sum(len(part.expert_ids) for part in routing)} samples that were given "
                    f"routing, got none of the last {left}: the trainer leaves samples out, or runs them elsewhere"
                )
        finally:
            self._given = None

    def _add(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._given is None:
            if self.required and model.training and torch.is_grad_enabled() and kwargs.get(KEYWORD) is None:
                raise ReplayError(
                    f"training forward of {type(model).__name__} without routing: replay is on, and this forward is "
                    "not one that the trainer's hook knows. Turn replay off, or call model.eval() for it"
                )
            return None
        return args, {**kwargs, KEYWORD: self._take(tokens_of(args, kwargs))}

    def _take(self, tokens: Tensor) -> Any:
        """The routing of the next samples `[n, S]`."""
        assert self._given is not None
        samples = len(tokens)
        held = len(self._given[0].expert_ids) if self._given else 0
        if held < samples:
            raise ReplayError(
                f"forward of {samples} samples: expected routing of as many, got {held} left of what was given: the "
                "trainer runs more forwards than its hook knows"
            )
        part = self._given.popleft()
        if held > samples:
            self._given.appendleft(part.select(slice(samples, None)))
        return part.select(slice(samples))
