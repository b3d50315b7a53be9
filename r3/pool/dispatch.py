"""Which engine gets which request, and what becomes of it when that engine fails.

Everything here runs in the thread of the pool's event loop, by callbacks: no request has a task of its own.
"""

import asyncio
import logging
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable

from r3.errors import CaptureError, summary
from r3.pool.clients.client import EngineFailedError, RequestAbortedError
from r3.pool.member import Member, MemberState
from r3.pool.request import Answer, Request

_SERVING = MemberState.SERVING  # looked up in the enumeration, it takes longer than what it is for
_ALIVE = (MemberState.SERVING, MemberState.SUSPECT)
_NO_ROOM = sys.maxsize
_CONVERSATIONS = 100_000  # whose engine is remembered

logger = logging.getLogger("r3")


class Dispatcher:
    """Sends each request to the engine with the least outstanding tokens, a turn to that of its conversation.

    Args:
        max_in_flight: most sequences in flight on an engine. What comes beyond waits here, first come first served. An
            idle engine takes a request of more samples than that.
        max_attempts: engines that a request is sent to before it fails.
        far_busier: a turn leaves its engine if that has more than `far_busier` times the outstanding tokens of the
            least loaded one, beyond its own.
        suspect: called with a member that has failed a request.

    Attributes:
        version: of the weights that serving members hold.
        held: while true nothing is sent: a weight sync is under way.
        moved: requests that were sent to another engine after one had failed.
    """

    def __init__(
        self,
        *,
        max_in_flight: int,
        max_attempts: int = 3,
        far_busier: float = 2.0,
        suspect: Callable[[Member], None] = lambda member: None,
    ) -> None:
        self.members: list[Member] = []
        self.version = 0
        self.held = False
        self.moved = 0
        self._max_in_flight = max_in_flight
        self._max_attempts = max_attempts
        self._far_busier = far_busier
        self._suspect = suspect
        self._loads: list[int] = []  # of each member; _NO_ROOM where it takes nothing
        self._waiting: deque[Request] = deque()
        self._homes: OrderedDict[Hashable, Member] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Requests that no engine has yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Send `request`, now or when an engine has room. Its future gets the answer, once."""
        if self._waiting or not self._send(request):
            self._waiting.append(request)
            self._fail_if_nobody_is_left()

    def add(self, member: Member) -> None:
        """Let `member` take requests, as soon as it is serving."""
        member.place = len(self.members)
        self.members.append(member)
        self._loads.append(_NO_ROOM)
        self.update(member)

    def remove(self, member: Member, cause: str) -> None:
        """Leave `member` out from here on. Its requests move to others."""
        self.lose(member, cause)
        del self.members[member.place], self._loads[member.place]
        for place, each in enumerate(self.members):
            each.place = place

    def lose(self, member: Member, cause: str) -> None:
        """`member` has died or does not answer. Its requests move to others, before those that wait."""
        member.state = MemberState.LOST
        self.update(member)
        failed, queued = [*member.in_flight.items()], [*member.queue]
        member.queue.clear()
        for request in reversed(queued):
            member.load -= request.tokens
            self._waiting.appendleft(request)
        for request, under_way in reversed(failed):
            member.drop(request)
            under_way.cancel()
            self._move(request, f"{member.name}: {cause}")
        self.go_on()

    def update(self, member: Member) -> None:
        """Take note that the state or the load of `member` has changed."""
        has_room = member.sequences < self._max_in_flight or not member.in_flight
        serves = member.state is _SERVING and has_room
        # A flat list of numbers: its least is found at the speed of C, whatever the number of engines.
        self._loads[member.place] = member.load if serves else _NO_ROOM

    def go_on(self) -> None:
        """Send what waits, as far as engines have room. If no engine is left, what waits fails."""
        if self.held:
            return
        self._fail_if_nobody_is_left()
        for member in self.members:
            self._serve_queue(member)
        self._send_waiting()

    def forget(self, requests: Iterable[Request]) -> None:
        """Give up `requests`: nobody waits for their answers any more."""
        given_up = set(requests)
        for request in given_up:
            request.answer.cancel()
        for member in self.members:
            for request, under_way in [*member.in_flight.items()]:
                if request in given_up:
                    under_way.cancel()

    def _send_waiting(self) -> None:
        while self._waiting and (self._waiting[0].answer.done() or self._send(self._waiting[0])):
            self._waiting.popleft()

    def _send(self, request: Request) -> bool:
        """Send `request`, or queue it at the engine of its conversation. False if no engine has room."""
        least = min(self._loads, default=_NO_ROOM)
        if self.held or least == _NO_ROOM:
            return False
        member = self.members[self._loads.index(least)]
        if request.conversation is not None:
            member = self._home(request, member)
        if self._has_room(member, request):
            self._start(member, request)
        elif request.conversation is not None:
            member.queue.append(request)
            member.load += request.tokens
            self.update(member)
        else:
            return False
        return True

    def _has_room(self, member: Member, request: Request) -> bool:
        return not member.in_flight or member.sequences + request.samples <= self._max_in_flight

    def _home(self, request: Request, least: Member) -> Member:
        """The engine of the request's conversation, whose prefix cache has the turns before; or `least`."""
        homes, key = self._homes, request.conversation
        home = homes.get(key)
        if home is not None and home.state is _SERVING and not self._far_busier_than(home, least, request):
            homes.move_to_end(key)
            return home
        homes[key] = least
        homes.move_to_end(key)
        if len(homes) > _CONVERSATIONS:
            homes.popitem(last=False)
        return least

    def _far_busier_than(self, home: Member, least: Member, request: Request) -> bool:
        return home.load > self._far_busier * (least.load + request.tokens)

    def _start(self, member: Member, request: Request) -> None:
        request.attempt += 1
        request.version = self.version
        under_way = member.client.start(request)
        request.sent_at = under_way.get_loop().time()
        member.take(request, under_way)
        self.update(member)

        def ended(future: asyncio.Future) -> None:
            # A member that was lost has nothing in flight: what still comes of it is late, and counts for nothing.
            if member.in_flight.get(request) is future:
                self._ended(member, request, future)

        under_way.add_done_callback(ended)

    def _serve_queue(self, member: Member) -> None:
        while member.queue and not self.held and self._has_room(member, member.queue[0]):
            request = member.queue.popleft()
            member.load -= request.tokens
            if not request.answer.done():
                self._start(member, request)

    def _ended(self, member: Member, request: Request, future: asyncio.Future) -> None:
        member.drop(request)
        self.update(member)
        error = None if future.cancelled() else future.exception()
        if request.answer.done():
            pass  # nobody waits for it any more
        elif self.held and isinstance(error, RequestAbortedError):
            # By the sync that is under way, and no fault of the engine's: asked anew after it, as if never sent.
            request.attempt -= 1
            self._waiting.appendleft(request)
        elif future.cancelled() or isinstance(error, EngineFailedError):
            if member.state is _SERVING:
                member.state = MemberState.SUSPECT
                self.update(member)
                self._suspect(member)
            self._move(request, f"{member.name}: {error or 'cancelled'}")
        elif error is None:
            member.answered += 1
            request.answer.set_result(Answer(future.result(), member.name, (request.version, self.version)))
        else:
            request.answer.set_exception(error)
        if member.queue:
            self._serve_queue(member)
        if self._waiting:
            self._send_waiting()

    def _move(self, request: Request, cause: str) -> None:
        if request.answer.done():
            return
        request.causes.append(cause)
        if request.attempt >= self._max_attempts:
            request.answer.set_exception(
                CaptureError(
                    f"a request with a prompt of {len(request.prompt_ids)} tokens was not answered by "
                    f"{request.attempt} engines:{summary(request.causes)}"
                )
            )
            return
        self.moved += 1
        logger.info("request moves to another engine: %s", cause)
        self._waiting.appendleft(request)

    def _fail_if_nobody_is_left(self) -> None:
        if self.held or any(member.state in _ALIVE for member in self.members):
            return
        while self._waiting:
            request = self._waiting.popleft()
            if not request.answer.done():
                causes = summary(request.causes) or ": it has none that serves"
                request.answer.set_exception(CaptureError(f"no engine of the pool is left{causes}"))
