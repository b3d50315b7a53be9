"""How the pool sends requests to one engine: the interface."""

import asyncio
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from r3.errors import R3Error
from r3.pool.request import Request


class EngineFailedError(R3Error, ConnectionError):
    """An engine did not answer a request, which another may answer."""


class RequestAbortedError(EngineFailedError):
    """An engine gave up a request, as it does for a weight sync that aborts what runs."""

    def __init__(self) -> None:
        super().__init__("it has aborted the request")


class EngineClient(ABC):
    """Sends requests to one engine, from the thread of the pool's event loop.

    Attributes:
        name: of the engine.
        idle_for_sync: whether a weight sync wants it without requests.
    """

    name: str
    idle_for_sync: ClassVar[bool] = False

    @abstractmethod
    def start(self, request: Request) -> asyncio.Future:
        """Send `request`. The future gets a response of which no completion was aborted.

        Its exception is `EngineFailedError` if another engine may answer; any other, such as a `CaptureError` for a
        request that the engine refuses, is the request's own. Cancelled, it gives up the answer.
        """

    @abstractmethod
    async def cause_of_death(self, timeout_s: float) -> str | None:
        """Why the engine cannot answer any more; None if it is alive.

        Raises:
            TimeoutError: it does not say within `timeout_s`.
        """

    async def close(self) -> None:  # noqa: B027
        """Release the client's resources. The engine keeps running."""


def finished(output: Any) -> Any:
    """A `RequestOutput` if none of its completions was aborted; else raises `RequestAbortedError`."""
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise RequestAbortedError
    return output
