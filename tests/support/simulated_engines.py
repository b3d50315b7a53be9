"""Engines for tests of the pool that sample nothing: they answer after a time, and fail as they are told to."""

import asyncio

from r3.pool.clients import EngineClient, EngineFailedError


class SimulatedEngine(EngineClient):
    """Answers `(name, number)` of how many it was asked, `seconds` after a request; at once if that is 0.

    Attributes:
        fails: while true each request fails.
        dead: what its health check says.
        silent: neither requests nor health checks are answered.
        asked: requests that were started.
        most: sequences that were in flight at a time.
    """

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        self.name = name
        self.seconds = seconds
        self.fails = self.silent = False
        self.dead: str | None = None
        self.asked: list = []
        self.in_flight = self.most = 0

    def start(self, request) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self.asked.append(request)
        self.in_flight += request.samples
        self.most = max(self.most, self.in_flight)
        answer.add_done_callback(lambda _: self._ended(request))
        loop.call_later(self.seconds, self._answer, answer, len(self.asked))
        return answer

    async def cause_of_death(self, timeout_s: float) -> str | None:
        while self.silent:
            await asyncio.sleep(0.01)
        return self.dead

    def _ended(self, request) -> None:
        self.in_flight -= request.samples

    def _answer(self, answer: asyncio.Future, number: int) -> None:
        if answer.done() or self.silent:
            return
        if self.fails or self.dead:
            answer.set_exception(EngineFailedError(self.dead or "the connection failed"))
        else:
            answer.set_result((self.name, number))
