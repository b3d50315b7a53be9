"""An engine of the pool, and what it has to do."""

import asyncio
from collections import deque
from enum import Enum

from r3.pool.clients.client import EngineClient
from r3.pool.request import Request
from r3.weight_sync import Engine


class MemberState(str, Enum):
    """SERVING takes requests. SUSPECT has failed one, and is asked for its health. JOINING waits for a weight sync that
    commits on it. LOST has died or does not answer."""

    SERVING = "serving"
    SUSPECT = "suspect"
    JOINING = "joining"
    LOST = "lost"

    def __str__(self) -> str:
        return self.value


class Member:
    """An engine of the pool.

    Attributes:
        client: sends it requests.
        state: only a serving member gets requests.
        load: outstanding tokens: of prompts, and sampled at most, of all requests in flight and queued.
        in_flight: requests it has not yet answered, the oldest first, each with the future of its response.
        sequences: samples of these requests.
        queue: turns of its conversations that wait for room on it.
        place: among the members.
        answered: requests that it has answered.
        missed: health checks in a row without an answer.
    """

    __slots__ = ("answered", "client", "in_flight", "load", "missed", "place", "queue", "sequences", "state")

    def __init__(self, client: EngineClient, state: MemberState = MemberState.SERVING) -> None:
        self.client = client
        self.state = state
        self.load = 0
        self.in_flight: dict[Request, asyncio.Future] = {}
        self.sequences = 0
        self.queue: deque[Request] = deque()
        self.place = 0
        self.answered = 0
        self.missed = 0

    @property
    def name(self) -> str:
        return self.client.name

    def take(self, request: Request, under_way: asyncio.Future) -> None:
        """Count `request` as in flight."""
        self.in_flight[request] = under_way
        self.load += request.tokens
        self.sequences += request.samples

    def drop(self, request: Request) -> None:
        """Count `request` as no longer in flight."""
        del self.in_flight[request]
        self.load -= request.tokens
        self.sequences -= request.samples


def version_of(adapter: Engine, timeout_s: float) -> int | None:
    """The version that all workers hold, -1 before a sync; None if they differ or are poisoned."""
    replies = adapter.replies("r3_status", [], timeout_s)
    versions = {-1 if reply["version"] is None else reply["version"] for reply in replies}
    return None if len(versions) > 1 or any(reply["cause"] for reply in replies) else versions.pop()
