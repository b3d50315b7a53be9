"""Refuses requests to an engine object of this process."""

from typing import Any

from r3.errors import SyncError

PAUSED = (
    "the engine is paused for a weight sync, and takes no request until one commits. If a sync failed, the engine "
    "may hold half-loaded weights: a complete sync (WeightSync.push) heals it"
)


class _Refusal:
    """Stands in for `add_request`. An engine has one, whoever put it there: any `allow` takes it away."""

    def __init__(self, replaced: Any, cause: str) -> None:
        self.replaced = replaced
        self.cause = cause

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise SyncError(self.cause)


class Guard:
    """Replaces `add_request` of one object, not of its class.

    Args:
        target: `LLMEngine` or `AsyncLLM`, which call their own `add_request` for every request.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def _standing(self) -> _Refusal | None:
        method = vars(self._target).get("add_request")
        return method if isinstance(method, _Refusal) else None

    @property
    def refusing(self) -> bool:
        """Whether requests are refused."""
        return self._standing() is not None

    def refuse(self, cause: str = PAUSED) -> None:
        """Let every request raise `SyncError(cause)`. A second call replaces the cause."""
        standing = self._standing()
        if standing is not None:
            standing.cause = cause
        else:
            self._target.add_request = _Refusal(vars(self._target).get("add_request"), cause)

    def allow(self) -> None:
        """Accept requests again. Does nothing if they are accepted already."""
        standing = self._standing()
        if standing is None:
            return
        if standing.replaced is None:
            del self._target.add_request
        else:
            self._target.add_request = standing.replaced
