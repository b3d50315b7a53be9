"""Rollouts and weight syncs over several engines: `EnginePool(WeightSync([...]))`."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from functools import partial
from typing import Any, Literal

from r3.capture import Rollouts
from r3.errors import CaptureError, EngineLostError, SyncError, summary
from r3.http import base_url
from r3.pool.clients import EngineClient, client_of
from r3.pool.dispatch import Dispatcher
from r3.pool.health import HealthCheck
from r3.pool.limits import PoolLimits
from r3.pool.loop import LoopThread
from r3.pool.member import Member, MemberState, version_of
from r3.pool.progress import progress_bar
from r3.pool.request import Answer, Request
from r3.pool.samples import Part, parts_of, rollouts_of
from r3.routing import RoutingSpec
from r3.weight_sync import Engine, SyncRanks, SyncReceipt, Weight, WeightSync

_LOOK_S = 0.1

logger = logging.getLogger("r3")


class EnginePool:
    """Several engines that sample together, and get the same weights.

    Args:
        sync: of all engines: URLs of `vllm serve`, `AsyncLLM`s or `vllm.LLM`s of this process, in any mixture. The pool
            closes it. With `on_lost="remove"` an engine that dies in a sync is removed from the pool, with a warning,
            and the sync commits on the rest; with "raise" that sync fails, and the engine may come back in the next.
        limits: what is asked of an engine at most.
        client: makes the client of an engine, from its adapter.

    Raises:
        CaptureError: an engine that takes no requests of a pool.

    Example:
        >>> pool = EnginePool(WeightSync(llm))  # or of a list: addresses, and engines of this process
        >>> sampling = {"n": 2, "max_tokens": 4, "logprobs": 0}
        >>> [rollout.engine for rollout in pool.generate([[3, 5, 7, 11]], sampling, None)]
        ['vllm.LLM', 'vllm.LLM']
        >>> pool.close()
    """

    def __init__(
        self,
        sync: WeightSync,
        limits: PoolLimits | None = None,
        *,
        client: Callable[[Engine], EngineClient] = client_of,
    ) -> None:
        self.sync = sync
        self.limits = limits or PoolLimits()
        self._make_client = client
        self._thread = LoopThread()
        self._closed = False
        self._members = threading.RLock()  # engines join and leave between syncs
        self._receipt: SyncReceipt | None = None
        limits = self.limits
        self._dispatcher = Dispatcher(
            max_in_flight=limits.max_in_flight,
            max_attempts=limits.max_attempts,
            far_busier=limits.far_busier,
            suspect=lambda member: self._health.ask(member),
        )
        self._health = HealthCheck(
            self._dispatcher,
            every_s=limits.health_every_s,
            timeout_s=limits.health_timeout_s,
            request_timeout_s=limits.request_timeout_s,
        )
        try:
            standing = {adapter: version_of(adapter, limits.health_timeout_s) for adapter in sync.engines}
            newest = max((version for version in standing.values() if version is not None), default=-1)
            self._dispatcher.version = max(newest, 0)
            for adapter, version in standing.items():
                self._thread.call(partial(self._add, adapter, version == newest))
        except BaseException:
            self.close()
            raise
        self._checking = self._thread.start(self._health.run())

    @property
    def version(self) -> int:
        """Of the weights that the serving engines hold; 0 before the first sync."""
        return self._dispatcher.version

    @property
    def engines(self) -> dict[str, str]:
        """State of each engine by its name: serving, suspect, joining or lost."""
        return self._thread.call(lambda: {member.name: str(member.state) for member in self._dispatcher.members})

    @property
    def counts(self) -> dict[str, int]:
        """`moved` requests so far, and by engine those that it has `answered`."""

        def count() -> dict[str, int]:
            members = self._dispatcher.members
            return {"moved": self._dispatcher.moved} | {f"answered/{each.name}": each.answered for each in members}

        return self._thread.call(count)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        spec: RoutingSpec | None,
        *,
        seed: int | None = None,
        conversations: Sequence[Hashable] | None = None,
        prompt_start: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Rollouts:
        """Sample all prompts, and collect the rollouts in their order; each says its engine and weight version.

        Every sample comes exactly once: the requests of an engine that fails move to others.

        Args:
            prompts: token ids.
            sampling: by the names of `vllm.SamplingParams` (`r3.capture.sampling_kwargs`), with `n` samples a prompt.
            spec: the routing that the trainer's model can replay (`Replay.spec`); None leaves routing out.
            seed: makes draws repeatable, whichever engine samples what. None leaves them to the engines.
            conversations: what each prompt is a turn of, by any key: the next turn goes to the engine whose prefix
                cache has this one, unless that is gone or far busier than others.
            prompt_start: tokens before it have no rows; for all prompts alike.
            on_error: as for `collect`.
            progress: show a bar on a terminal, if tqdm is installed.

        Raises:
            SyncError: the engines hold half-loaded weights.
            CaptureError: no engine serves; a request was refused, or failed on as many engines as it may; or a rollout
                that is not captured correctly.
        """
        parts = self._parts(prompts, sampling, seed, conversations)
        requests: list[Request] = []
        answers = self._thread.start(self._answers(prompts, parts, sampling, prompt_start, requests))
        try:
            with progress_bar(sum(part.sampling["n"] for part in parts), "rollouts", shown=progress) as show:
                while not futures.wait([answers], _LOOK_S).done:
                    show(lambda: sum(request.samples for request in list(requests) if request.answer.done()))
            return rollouts_of(parts, answers.result(), spec, prompt_start=prompt_start, on_error=on_error)
        except BaseException:
            answers.cancel()
            raise

    async def generate_async(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        spec: RoutingSpec | None,
        *,
        seed: int | None = None,
        conversations: Sequence[Hashable] | None = None,
        prompt_start: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Rollouts:
        """As `generate`, for callers on an event loop; many may wait at a time. Cancelled, it gives up its requests."""
        parts = self._parts(prompts, sampling, seed, conversations)
        answers = await asyncio.wrap_future(
            self._thread.start(self._answers(prompts, parts, sampling, prompt_start, []))
        )
        return await asyncio.to_thread(rollouts_of, parts, answers, spec, prompt_start=prompt_start, on_error=on_error)

    def push(
        self,
        named_tensors: Iterable[tuple[str, Weight]],
        *,
        version: int,
        frozen: Sequence[str] = (),
        agree: Callable[[], Any] | None = None,
        ranks: SyncRanks | None = None,
    ) -> SyncReceipt:
        """Sync all engines, those that join among them: `WeightSync.push`. No request is sent meanwhile.

        Where lost engines are removed, and no other rank has to agree, the weights are pushed again to the rest.

        Raises:
            SyncError: it did not commit everywhere. The next push heals.
            EngineLostError: engines were removed, and the `ranks`, or those that `agree`, have to push again together.
        """
        with self._members:
            return self._push([*named_tensors], version, frozen, agree, ranks)

    def join(self, engine: Any) -> str:
        """Add an engine between syncs. It takes requests once it holds the current version: from the next `push` on, or
        from `catch_up`; at once if it has that version already.

        Args:
            engine: as `WeightSync` takes it.

        Returns:
            Its name.

        Raises:
            SyncError: it has no worker extension, or does not answer; or it is in the pool, and not lost.
        """
        with self._members:
            return self._join(engine)

    def leave(self, name: str) -> None:
        """Remove an engine between syncs. Requests that it has move to others.

        Raises:
            SyncError: no engine has this name, or it is the only one.
        """
        with self._members:
            self.sync.remove(name)
            self._thread.call(lambda: self._remove(name, "it has left the pool"))

    def catch_up(self, named_tensors: Iterable[tuple[str, Weight]]) -> SyncReceipt | None:
        """Commit the current version on the engines that join, while the others go on. None if none joins.

        Args:
            named_tensors: of the last `push`, unchanged since.

        Raises:
            SyncError: no push came before; other weights than it sent, which poisons the engines that join; or the sync
                did not commit on them.
        """
        with self._members:
            names = self._named(MemberState.JOINING)
            if not names:
                return None
            if self._receipt is None:
                raise SyncError("catch_up: expected a push before, whose weights the engines that join can get; push")
            receipt = self.sync.push_to(names, named_tensors, like=self._receipt)
            self._thread.call(lambda: self._committed(set(names), self.version))
            return receipt

    def require_committed(self) -> None:
        """Raise `SyncError` if the engines' weights cannot be trusted."""
        self.sync.require_committed()

    def close(self) -> None:
        """Give up all requests, and close the sync. The engines keep running. A second call does nothing."""
        if self._closed:
            return
        self._closed = True

        async def close() -> None:
            for member in self._dispatcher.members:
                for under_way in [*member.in_flight.values()]:
                    under_way.cancel()
            await asyncio.gather(*(member.client.close() for member in self._dispatcher.members))

        self._thread.close(close)
        self.sync.close()

    def __enter__(self) -> "EnginePool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _parts(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        seed: int | None,
        conversations: Sequence[Hashable] | None,
    ) -> list[Part]:
        self.require_committed()
        states = self.engines
        serving = sum(state in (MemberState.SERVING, MemberState.SUSPECT) for state in states.values())
        if not serving:
            raise CaptureError(
                "no engine of the pool serves: push the weights to those that join, or let others join:"
                + summary(f"{name}: {state}" for name, state in states.items())
            )
        return parts_of(prompts, sampling, engines=serving, seed=seed, conversations=conversations)

    async def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        parts: Sequence[Part],
        sampling: Mapping[str, Any],
        prompt_start: int,
        requests: list[Request],
    ) -> list[Answer | BaseException]:
        loop = asyncio.get_running_loop()
        start = {"routed_experts_prompt_start": prompt_start} if prompt_start else {}
        for part in parts:
            request = Request(
                prompts[part.prompt], part.sampling | start, loop.create_future(), conversation=part.conversation
            )
            requests.append(request)
            self._dispatcher.submit(request)
        try:
            return await asyncio.gather(*(request.answer for request in requests), return_exceptions=True)
        except asyncio.CancelledError:
            self._dispatcher.forget(requests)
            raise

    # -- members ------------------------------------------------------------------------------------------------------

    def _add(self, adapter: Engine, current: bool) -> None:
        state = MemberState.SERVING if current else MemberState.JOINING
        self._dispatcher.add(Member(self._make_client(adapter), state))
        self._dispatcher.go_on()

    def _join(self, engine: Any) -> str:
        name = base_url(engine) if isinstance(engine, str) else str(getattr(engine, "name", ""))
        state = self.engines.get(name)
        if state == MemberState.LOST and len(self.sync.engines) > 1:
            self.leave(name)
        elif state is not None:
            raise SyncError(f"{name} is in the pool already, and {state}")
        adapter = self.sync.add(engine)
        try:
            version = version_of(adapter, self.limits.health_timeout_s)
            current = version is not None and max(version, 0) == self.version
            self._thread.call(lambda: self._add(adapter, current))
        except BaseException:
            self.sync.remove(adapter.name)
            raise
        return adapter.name

    def _remove(self, name: str, cause: str) -> None:
        for member in [each for each in self._dispatcher.members if each.name == name]:
            self._dispatcher.remove(member, cause)
            asyncio.get_running_loop().create_task(member.client.close())

    def _committed(self, names: set[str], version: int) -> None:
        self._dispatcher.version = version
        for member in self._dispatcher.members:
            if member.name in names:
                member.state, member.missed = MemberState.SERVING, 0
                self._dispatcher.update(member)
        self._dispatcher.go_on()

    def _stand(self, names: Iterable[str]) -> None:
        """Send nothing more to engines that may stand still: a sync has to commit on them."""
        for member in self._dispatcher.members:
            if member.name in names and member.state is not MemberState.LOST:
                member.state = MemberState.JOINING
                self._dispatcher.update(member)

    def _named(self, state: MemberState) -> list[str]:
        return [name for name, found in self.engines.items() if found == state]

    # -- syncs --------------------------------------------------------------------------------------------------------

    def _push(
        self,
        weights: list[tuple[str, Weight]],
        version: int,
        frozen: Sequence[str],
        agree: Callable[[], Any] | None,
        ranks: SyncRanks | None,
    ) -> SyncReceipt:
        if self.sync.removes_lost:  # waiting for them once more would take a timeout
            for name in self._named(MemberState.LOST)[: len(self.sync.engines) - 1]:
                logger.warning("engine %s is removed from the pool: it was lost since the last sync", name)
                self.leave(name)
        with self._held():
            while True:
                try:
                    receipt = self.sync.push(weights, version=version, frozen=frozen, agree=agree, ranks=ranks)
                except EngineLostError:
                    if agree is not None or ranks is not None:
                        raise
                    continue
                finally:  # also of a sync that failed after it had removed some
                    self._remove_lost()
                    self._thread.call(lambda: self._stand(self.sync.standing))
                self._receipt = receipt
                self._thread.call(lambda: self._committed({each.name for each in self.sync.engines}, version))
                return receipt

    def _remove_lost(self) -> None:
        for name, cause in dict(self.sync.lost).items():
            self._thread.call(partial(self._remove, name, cause))

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Context in which nothing is sent. After a sync that failed, requests wait until one commits."""
        self._thread.call(lambda: setattr(self._dispatcher, "held", True))
        try:
            self._drain()
            yield
        finally:
            if self.sync.poisoned is None:
                self._thread.call(lambda: setattr(self._dispatcher, "held", False))
                self._thread.call(self._dispatcher.go_on)

    def _drain(self) -> None:
        """Wait for the engines that must be idle in a sync."""

        def busy() -> list[str]:
            members = self._dispatcher.members
            return [each.name for each in members if each.client.idle_for_sync and each.in_flight]

        until = time.monotonic() + self.limits.request_timeout_s
        while names := self._thread.call(busy):
            if time.monotonic() > until:
                raise SyncError(f"{', '.join(names)}: expected idle engines for a sync, got requests in flight")
            time.sleep(0.01)
