"""Health of a pool's engines: who has died, who does not answer, who has held a request for too long."""

import asyncio
import logging
from collections.abc import Iterable

from r3.pool.dispatch import Dispatcher
from r3.pool.member import Member, MemberState

logger = logging.getLogger("r3")


class HealthCheck:
    """Asks every engine for its health, from time to time, and at once where a request has failed.

    Args:
        dispatcher: whose members are asked. Of a lost one the requests move to others.
        every_s: between two checks.
        timeout_s: longest wait for an answer.
        misses: checks in a row without an answer after which an engine is lost. One that says that it has died, or
            refuses the connection, is lost at once.
        request_timeout_s: longest wait for the answer to a request, after which its engine is lost: a process that was
            stopped below a server that answers shows by this alone.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        every_s: float,
        timeout_s: float,
        request_timeout_s: float,
        misses: int = 3,
    ) -> None:
        self._dispatcher = dispatcher
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s
        self._misses = misses
        self._under_way: dict[Member, asyncio.Task] = {}

    async def run(self) -> None:
        """Check for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            self._find_overdue()
            for member in self._asked():
                self.ask(member)

    def ask(self, member: Member) -> None:
        """Ask `member` now, in a task, unless it is being asked."""
        if member not in self._under_way:
            task = asyncio.get_running_loop().create_task(self._ask(member))
            self._under_way[member] = task
            task.add_done_callback(lambda _: self._under_way.pop(member))

    def _asked(self) -> Iterable[Member]:
        return [member for member in self._dispatcher.members if member.state is not MemberState.LOST]

    async def _ask(self, member: Member) -> None:
        try:
            cause = await asyncio.wait_for(member.client.cause_of_death(self._timeout_s), self._timeout_s)
        except (TimeoutError, asyncio.TimeoutError):  # the same from Python 3.11 on
            member.missed += 1
            if member.missed < self._misses:
                return
            cause = f"no answer to {member.missed} health checks of {self._timeout_s:g} s each"
        if cause is not None:
            self._lose(member, cause)
            return
        member.missed = 0
        if member.state is MemberState.SUSPECT:
            member.state = MemberState.SERVING
            self._dispatcher.update(member)
            self._dispatcher.go_on()

    def _lose(self, member: Member, cause: str) -> None:
        if member.state is MemberState.LOST or member not in self._dispatcher.members:
            return
        logger.warning(
            "engine %s is lost: %s. Its %d requests move to others", member.name, cause, len(member.in_flight)
        )
        self._dispatcher.lose(member, cause)

    def _find_overdue(self) -> None:
        now = asyncio.get_running_loop().time()
        for member in self._asked():
            oldest = next(iter(member.in_flight), None)
            if oldest is not None and now - oldest.sent_at > self._request_timeout_s and not self._dispatcher.held:
                self._lose(member, f"no answer to a request within {self._request_timeout_s:g} s")
