"""Adapter for `AsyncLLM`, called from a thread other than that of its event loop."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from r3.errors import SyncError
from r3.vllm_compat.engines import pause_and_queue, version_setter
from r3.weight_sync.engines.deadline import Deadline, answer_of
from r3.weight_sync.engines.engine import Engine, Reply, RunningRequests, failed, require_replies
from r3.weight_sync.engines.request_guard import Guard


class AsyncEngine(Engine):
    """`vllm.v1.engine.async_llm.AsyncLLM` with all data-parallel ranks that its client reaches.

    A paused engine queues requests; after `refuse` they raise. `EngineGenerateError` of vLLM then has the `SyncError`
    as its cause.

    Args:
        engine: the `AsyncLLM`.
        on_running: what a pause does with running requests: "wait" for their end, "abort" them, or "keep" them frozen.
        loop: the event loop that the engine runs on; None to find it.
    """

    remedy = (
        "An AsyncLLM with data_parallel_external_lb (or hybrid) reaches its own ranks alone: give the list of all, or "
        "let one AsyncLLM run all ranks"
    )

    def __init__(self, engine: Any, on_running: RunningRequests, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.name = "AsyncLLM"
        self.engine = engine
        self._on_running = on_running
        self._given_loop = loop
        self._guard = Guard(engine)

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        # timeout None: what a worker answers after a timeout of vLLM's is taken for the answer to its next call.
        call = self._run(
            method, lambda: self._everywhere("collective_rpc", method, None, tuple(args), None), Deadline(timeout_s)
        )
        parallel = self.engine.vllm_config.parallel_config
        known = {"world_size": parallel.world_size}
        return [
            # Engine cores of a dense model do not know that they are ranks: the client does.
            known | reply | {"dp_rank": dp_rank, "dp_size": parallel.data_parallel_size}
            for dp_rank, replies in call
            for reply in require_replies(replies, f"{self.name}: {method}")
        ]

    def pause(self, timeout_s: float) -> bool:
        deadline = Deadline(timeout_s)
        states = self._run("is_paused", lambda: self._everywhere("is_scheduler_paused"), deadline)
        served = not any(paused for _, paused in states)
        # Requests that an earlier pause has frozen must not be drained now, maybe with half-loaded weights.
        mode = "keep" if not served and self._on_running == "wait" else self._on_running
        try:
            self._run(
                f"pause_scheduler(mode={mode!r})",
                lambda: pause_and_queue(self.engine, mode),
                deadline,
            )
        except BaseException:
            if served and self.cause_of_death() is None:
                # Queued behind the pause; waiting for it would take time that is not there.
                asyncio.run_coroutine_threadsafe(self.engine.resume_generation(), self.event_loop())
            raise
        return served

    def resume(self, timeout_s: float) -> None:
        self._run("resume_generation", self.engine.resume_generation, Deadline(timeout_s))
        self._guard.allow()

    def refuse(self, cause: str) -> None:
        self._guard.refuse(cause)

    def reset_caches(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        connector = self.engine.vllm_config.kv_transfer_config is not None
        reset = self._run(
            "reset_prefix_cache", lambda: self._everywhere("reset_prefix_cache", True, connector), deadline
        )
        kept = [dp_rank for dp_rank, done in reset if not done]
        if kept:
            raise SyncError(
                f"{self.name}: vLLM did not reset the prefix cache of data-parallel ranks {kept}, which holds keys of "
                "the old weights: requests hold blocks of it"
            )
        if self.engine.vllm_config.model_config.is_multimodal_model:
            self._run("reset_mm_cache", self.engine.reset_mm_cache, deadline)
            self._run("reset_encoder_cache", self.engine.reset_encoder_cache, deadline)

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        update = version_setter(self.engine)
        if update is not None:
            self._run("update_weight_version", lambda: update(str(version)), Deadline(timeout_s))

    async def _everywhere(self, method: str, *args: Any) -> list[tuple[int, Any]]:
        """(data-parallel rank, result) of `method` on every engine core.

        vLLM's own call asks all and returns the first one's result (`DPLBAsyncMPClient.call_utility_async`, 0.22 to
        0.32), so that another rank's failure to reset, say, is lost. Goes when vLLM returns all.
        """
        core = self.engine.engine_core
        results = await asyncio.gather(
            *(core._call_utility_async(method, *args, engine=identity) for identity in core.core_engines)
        )
        return [
            (int.from_bytes(identity, "little"), result)
            for identity, result in zip(core.core_engines, results, strict=True)
        ]

    def _run(self, operation: str, start: Callable[[], Coroutine[Any, Any, Any]], deadline: Deadline) -> Any:
        loop = self.event_loop()
        if (cause := self.cause_of_death()) is not None:
            raise SyncError(f"{self.name}: {cause} before {operation}. Start it anew, then sync")
        future = asyncio.run_coroutine_threadsafe(start(), loop)
        try:
            return answer_of(future, deadline, where=self.name, operation=operation, dead=self.cause_of_death)
        except SyncError:
            raise
        except Exception as error:
            raise failed(self.name, operation, error, self.cause_of_death()) from error

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the engine runs on. Raises `SyncError` on its own thread, and if it does not run."""
        loop = self._given_loop or self._find_loop()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            raise SyncError(
                f"{self.name}: called on the thread of the engine's own event loop, which would wait for itself: "
                "await asyncio.to_thread(sync.push, ...)"
            )
        if not loop.is_running():
            raise SyncError(
                f"{self.name}: its event loop does not run, so that nothing can answer: sync in a thread beside it "
                "(await asyncio.to_thread(sync.push, ...))"
            )
        return loop

    def _find_loop(self) -> asyncio.AbstractEventLoop:
        tasks = (self.engine.output_handler, self.engine.engine_core.resources.output_queue_task)
        for task in tasks:
            if task is not None:
                return task.get_loop()
        raise SyncError(
            f"{self.name}: it runs on no event loop yet, so that there is none to send calls to: make it in a "
            "coroutine, or give engine_of(..., loop=...)"
        )

    def cause_of_death(self) -> str | None:
        return "the engine has died" if self.engine.errored else None
