"""Adapter for `vllm.LLM`. It has no pause: it must be idle, and refuses requests while a sync is open."""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch

from r3.errors import SyncError
from r3.vllm_compat.engines import version_setter
from r3.weight_sync.engines.deadline import Deadline, answer_of, in_thread
from r3.weight_sync.engines.engine import Engine, Reply, failed, require_replies
from r3.weight_sync.engines.request_guard import Guard


class _OneAtATime:
    """Stands in for `_send_input` of vLLM's client, which writes to a ZeroMQ socket: threads must not share one.

    A sync that ends early gives up while a call may still be on its way. Without this the messages mix, and the engine
    waits for ever, or ZeroMQ ends the process. A client has one, whoever put it there.
    """

    def __init__(self, client: Any) -> None:
        self._send = weakref.WeakMethod(client._send_input)
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        send = self._send()
        assert send is not None
        with self._lock:
            return send(*args, **kwargs)


class OfflineEngine(Engine):
    """A `vllm.LLM`, with its engine core in this process or another.

    `SyncMPClient.call_utility` waits without a timeout (0.22 to 0.32), and its futures stay open when the engine core
    dies: each call waits in a thread of its own. vLLM's own timeout of `collective_rpc` is never used: what a worker
    answers after it stays in the executor's queue, and is taken for the answer to the next call.
    """

    remedy = (
        "A vllm.LLM reaches its own data-parallel rank alone. Give the list of the LLMs of all ranks, if they are in "
        "this process; else use AsyncLLM, which reaches all ranks, or one server a rank"
    )

    def __init__(self, llm: Any) -> None:
        self.name = "vllm.LLM"
        self.llm = llm
        self._core = llm.llm_engine.engine_core
        # More than one worker have processes of their own in any case.
        workers = llm.llm_engine.vllm_config.parallel_config.world_size
        self.in_this_process = not self._in_process_of_its_own and workers == 1
        if self._in_process_of_its_own and not isinstance(self._core._send_input, _OneAtATime):
            self._core._send_input = _OneAtATime(self._core)
        self._guard = Guard(llm.llm_engine)
        self._last: Future | None = None

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        def ask() -> Any:
            return self.llm.collective_rpc(method, timeout=None, args=tuple(args))

        replies = require_replies(self._run(method, ask, Deadline(timeout_s)), f"{self.name}: {method}")
        parallel = self.llm.llm_engine.vllm_config.parallel_config
        # Engine cores of a dense model do not know that they are ranks: the client does.
        ranks = {"dp_rank": parallel.data_parallel_rank, "dp_size": parallel.data_parallel_size}
        return [{"world_size": parallel.world_size} | reply | ranks for reply in replies]

    def pause(self, timeout_s: float) -> bool:
        if self._run("has_unfinished_requests", self._has_unfinished_requests, Deadline(timeout_s)):
            raise SyncError(
                f"{self.name}: expected an idle engine, got unfinished requests: finish or abort them before a sync "
                "(a vllm.LLM has no pause)"
            )
        served = not self._guard.refusing
        self._guard.refuse()
        return served

    def resume(self, timeout_s: float) -> None:
        Deadline(timeout_s)
        self._guard.allow()

    def refuse(self, cause: str) -> None:
        self._guard.refuse(cause)

    def reset_caches(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        connector = self.llm.llm_engine.vllm_config.kv_transfer_config is not None
        if not self._run("reset_prefix_cache", lambda: self.llm.reset_prefix_cache(True, connector), deadline):
            raise SyncError(
                f"{self.name}: vLLM did not reset its prefix cache, which holds keys of the old weights: requests "
                "hold blocks of it"
            )
        if self.llm.llm_engine.vllm_config.model_config.is_multimodal_model:
            self._run("reset_mm_cache", self.llm.reset_mm_cache, deadline)
            self._run("reset_encoder_cache", self.llm.llm_engine.reset_encoder_cache, deadline)

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        update = version_setter(self.llm)
        if update is not None:
            self._run("update_weight_version", lambda: update(str(version)), Deadline(timeout_s))

    def _has_unfinished_requests(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def _run(self, operation: str, function: Callable[[], Any], deadline: Deadline) -> Any:
        if (cause := self.cause_of_death()) is not None:
            raise SyncError(f"{self.name}: {cause} before {operation}. Start it anew, then sync")
        future = self._submit(function)
        try:
            return answer_of(future, deadline, where=self.name, operation=operation, dead=self.cause_of_death)
        except SyncError:
            raise
        except Exception as error:
            raise failed(self.name, operation, error, self.cause_of_death()) from error

    def _submit(self, function: Callable[[], Any]) -> Future:
        if self._in_process_of_its_own:
            return in_thread(function)
        # The engine core is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0): no queue of its own keeps the order,
        # and the current CUDA device is one of the caller's thread.
        before = self._last
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def in_order() -> Any:
            if before is not None:
                wait([before])
            if device is not None:
                torch.cuda.set_device(device)
            return function()

        self._last = in_thread(in_order)
        return self._last

    @property
    def _in_process_of_its_own(self) -> bool:
        return hasattr(self._core, "resources")

    def cause_of_death(self) -> str | None:
        resources = getattr(self._core, "resources", None)
        return "the engine core has died" if resources is not None and resources.engine_dead else None
