"""Servers of a pool, simulated in this process.

Their workers really receive what a sync sends, and their rollouts are of the weights that they hold. They can be
stopped, go on later with what they were asked meanwhile, and be killed.
"""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from r3.errors import SyncError
from r3.pool.clients import EngineClient, EngineFailedError
from r3.weight_sync import Engine, combine, digest
from r3.weight_sync.states import SyncState
from r3.weight_sync.transports import RECEIVERS, Receiver

_POLL_S = 2e-3
_AT_ONCE = 6  # tokens


class SimulatedServer:
    """One server with one worker, which holds a tensor `number`, and may hold others.

    Attributes:
        url: its name.
        process: as of a real one.
        alive, running: of the process; what is not running does nothing.
        core_running: of the part below the HTTP server.
        serves: whether it is not paused.
        weights: the number that it holds.
    """

    def __init__(self, name: str) -> None:
        self.url = f"http://{name}"
        self.process = SimpleNamespace(poll=lambda: None if self.alive else -9)
        self._lock = threading.RLock()
        self.start()

    def start(self) -> None:
        self.alive = self.running = self.core_running = self.serves = True
        self.weights = 0
        self.worker = _Worker(self)
        self._backlog: list[Any] = []

    def wait(self) -> None: ...

    def close(self) -> list[str]:
        self.alive = False
        return []

    def healthy(self) -> bool:
        return self.alive

    def signal(self, number: int, *, core: bool = False) -> None:
        with self._lock:
            if number == signal.SIGKILL:
                self.alive = False
                return
            goes_on = number == signal.SIGCONT
            self.core_running = goes_on
            if not core or goes_on:
                self.running = goes_on
            if self.active:  # what came meanwhile, in order, whoever has given up waiting for it
                backlog, self._backlog = self._backlog, []
                for call in backlog:
                    call()

    @property
    def active(self) -> bool:
        return self.alive and self.running and self.core_running

    def ask(self, call: Any, what: str, timeout_s: float) -> Any:
        """The answer of `call`, once the server is active; its late answer is dropped."""
        answer: list[Any] = []
        with self._lock:
            if self.alive and not self.active:
                self._backlog.append(lambda: answer.append(call()))
            elif self.alive:
                return call()
        until = time.monotonic() + timeout_s
        while self.alive and not answer:
            if time.monotonic() > until:
                raise SyncError(f"{self.url}: no answer to {what} within {timeout_s:g} s")
            time.sleep(_POLL_S)
        if not answer:
            raise SyncError(f"{self.url}: the connection failed in {what}")
        return answer[0]


class _Worker:
    """The states of a worker in a sync, as the real one has them, and its tensor."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self.name = f"{server.url} {id(self)}"  # another one's after a restart
        self.version: int | None = None
        self.state, self.cause = SyncState.IDLE, ""
        self._id = self._given_up = ""
        self._touched, self._until, self._lease_s = False, 0.0, 0.0
        self._receiver: Receiver | None = None
        self.held: dict[str, torch.Tensor] = {}

    def answer(self, method: str, args: Sequence[Any]) -> dict[str, Any]:
        try:
            more = getattr(self, method)(*args)
        except RuntimeError as error:
            more = {"error": str(error)}
        reply = {"rank": 0, "dp_rank": 0, "world_size": 1, "dp_size": 1, "worker": self.name, "gpu": None}
        reply |= {"version": self.version, "state": self.state.value, "cause": self.cause}
        reply["connection_id"] = None if self._receiver is None else self._receiver.connection_id
        return reply | {"base_version": None} | more

    def r3_status(self) -> dict:
        return {}

    def r3_reserve(self, sync_id: str, version: int, sender: str, lease_s: float) -> dict:
        if sync_id == self._given_up:
            raise RuntimeError("given up before this came")
        if self._id and time.monotonic() < self._until:
            raise RuntimeError("a sync by another sender is under way")
        if self._id:
            self._give_up("its sender was silent")
        if self.version is not None and version <= self.version:
            raise RuntimeError(f"expected a version above {self.version}, got {version}")
        self._id, self._next, self._touched, self._lease_s = sync_id, version, False, lease_s
        self.state = SyncState.RESERVED
        self._renew()
        return {}

    def r3_begin(self, sync_id: str, sync: dict) -> dict:
        self._require(sync_id, SyncState.RESERVED)
        self._manifest, self._loaded, self.state = sync["manifest"], {}, SyncState.OPEN
        offer, receiver = sync["offer"], self._receiver
        if receiver is None or receiver.connection_id is None or receiver.connection_id != offer.get("connection_id"):
            self._drop_receiver()
            with self._giving_up():
                made = RECEIVERS[offer["transport"]]
                number = sync["ranks"][self.name]
                self._receiver = made(offer, number, torch.device("cpu"), sync["timeout_s"])
        return {"draft": "", "kept": {}}

    def r3_load(self, sync_id: str, index: int, chunks: list) -> dict:
        self._require(sync_id, SyncState.OPEN)
        self._touched = True
        self._server.weights = -1  # half-loaded
        with self._giving_up():
            for names, where in chunks:
                came = dict(self._receiver.receive(where))
                if came.keys() != {*names}:
                    raise SyncError(f"expected {names}, got {[*came]}")
                self._loaded |= {name: tensor.clone() for name, tensor in came.items()}
            self._receiver.release(index)
        return {}

    def r3_seal(self, sync_id: str, digests: dict) -> dict:
        self._require(sync_id, SyncState.OPEN)
        with self._giving_up():
            found = {name: digest(tensor) for name, tensor in self._loaded.items()}
            if found != digests or found.keys() != self._manifest.keys():
                raise SyncError("other content than was sent")
            self._receiver.flush()
        self.state, self._digest = SyncState.SEALED, combine(digests)
        return {"digest": self._digest}

    def r3_commit(self, sync_id: str) -> dict:
        self._require(sync_id, SyncState.SEALED)
        self.state, self.version, self.cause = SyncState.COMMITTED, self._next, ""
        self.held, self._server.weights = self._loaded, int(self._loaded["number"])
        return {"digest": self._digest}

    def r3_release(self, sync_id: str) -> dict:
        self._require(sync_id, SyncState.COMMITTED)
        self._id, self.state = "", SyncState.IDLE
        return {}

    def r3_abort(self, sync_id: str, cause: str) -> dict:
        self._given_up = sync_id
        if self._id == sync_id:
            self._give_up(cause)
        return {}

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._give_up(str(error))
            raise RuntimeError(str(error)) from error

    def _drop_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.abort()
            self._receiver = None

    def _give_up(self, cause: str) -> None:
        self._drop_receiver()
        self._id, self.cause = "", cause if self._touched else self.cause
        self.state = SyncState.POISONED if self.cause else SyncState.IDLE

    def _require(self, sync_id: str, state: SyncState) -> None:
        if (self._id, self.state) != (sync_id, state):
            raise RuntimeError(f"sync {sync_id} is not {state} here: the worker is {self.state}")
        self._renew()

    def _renew(self) -> None:
        self._until = time.monotonic() + self._lease_s


class SimulatedAdapter(Engine):
    """Of a `SimulatedServer`, for a weight sync."""

    remedy = ""

    def __init__(self, server: SimulatedServer) -> None:
        self.name, self.server = server.url, server

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        return [self.server.ask(lambda: self.server.worker.answer(method, args), method, timeout_s)]

    def pause(self, timeout_s: float) -> bool:
        def pause() -> bool:
            served, self.server.serves = self.server.serves, False
            return served

        return self.server.ask(pause, "pause", timeout_s)

    def resume(self, timeout_s: float) -> None:
        self.server.ask(lambda: setattr(self.server, "serves", True), "resume", timeout_s)

    def refuse(self, cause: str) -> None: ...

    def reset_caches(self, timeout_s: float) -> None:
        self.server.ask(lambda: None, "caches", timeout_s)

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        self.server.ask(lambda: None, "label", timeout_s)


class SimulatedClient(EngineClient):
    """Of a `SimulatedServer`, for the pool: each sampled token is the number that the server holds."""

    def __init__(self, server: SimulatedServer, seconds: float) -> None:
        self.name, self._server, self._seconds = server.url, server, seconds

    def start(self, request: Any) -> asyncio.Future:
        return asyncio.get_running_loop().create_task(self._run(request))

    async def cause_of_death(self, timeout_s: float) -> str | None:
        while self._server.alive and not self._server.running:
            await asyncio.sleep(_POLL_S)
        return None if self._server.alive else "the server has gone"

    async def _run(self, request: Any) -> dict[str, Any]:
        tokens: list[int] = []
        for _ in range(request.sampling["max_tokens"] // _AT_ONCE):
            await asyncio.sleep(self._seconds * _AT_ONCE)
            while self._server.alive and not (self._server.active and self._server.serves):
                await asyncio.sleep(_POLL_S)
            if not self._server.alive:
                raise EngineFailedError("the connection failed")
            tokens += [self._server.weights] * _AT_ONCE
        content = [{"token": f"token_id:{token}", "logprob": -0.5} for token in tokens]
        choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "length"}
        choices = [{"index": number, **choice} for number in range(request.samples)]
        return {"prompt_token_ids": list(request.prompt_ids), "choices": choices}
