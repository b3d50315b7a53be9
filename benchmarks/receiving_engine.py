"""An engine without a model: its workers receive what a sync sends, and check its digests. For benchmarks and tests."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync import ContentDigests, Engine, combine
from r3.weight_sync.transports import RECEIVERS, Receiver


class ReceivingWorker:
    """Follows the calls of a sync as r3's worker does, and holds what came.

    Args:
        name: its own among all workers.
        rank, size: in its engine.
        device: where it receives.
        keeps: whether it holds tensors; else only their digests.
    """

    def __init__(self, name: str, rank: int, size: int, device: torch.device, *, keeps: bool = True) -> None:
        self.held: dict[str, Tensor] = {}
        self.version: int | None = None
        self.cause = ""
        self._name, self._rank, self._size = name, rank, size
        self._device = device
        self._keeps = keeps
        self._receiver: Receiver | None = None
        self._state = "idle"

    def answer(self, method: str, args: Sequence[Any]) -> dict[str, Any]:
        try:
            more = getattr(self, method)(*args) or {}
        except Exception as error:
            more = {"error": f"{type(error).__name__}: {error}"}
            self.r3_abort("", more["error"])
        return {
            "rank": self._rank,
            "world_size": self._size,
            "dp_rank": 0,
            "dp_size": 1,
            "worker": self._name,
            "gpu": None,
            "version": self.version,
            "state": self._state,
            "cause": self.cause,
            "base_version": None,
            "connection_id": None if self._receiver is None else self._receiver.connection_id,
            **more,
        }

    def r3_status(self) -> None: ...

    def r3_reserve(self, sync_id: str, version: int, sender: str, lease_s: float) -> None:
        if self.version is not None and version <= self.version:
            raise SyncError(f"expected a version above {self.version}, got {version}")
        self._next, self._state = version, "reserved"

    def r3_begin(self, sync_id: str, sync: dict[str, Any]) -> dict[str, Any]:
        offer = sync["offer"]
        if self._receiver is None or self._receiver.connection_id != offer.get("connection_id"):
            if self._receiver is not None:
                self._receiver.abort()
            self._receiver = RECEIVERS[offer["transport"]](
                offer, sync["ranks"][self._name], self._device, sync["timeout_s"]
            )
        self._manifest, self._names, self._state = sync["manifest"], set(), "open"
        self._came: dict[str, Tensor] = {}
        self._digests = ContentDigests()
        return {"draft": "", "kept": {}}

    def r3_load(self, sync_id: str, index: int, chunks: list) -> None:
        assert self._receiver is not None
        for names, where in chunks:
            chunk = self._receiver.receive(where)
            if sorted(names) != sorted(name for name, _ in chunk) or self._names & set(names):
                raise SyncError(f"expected the tensors announced, each once, got {[name for name, _ in chunk][:16]}")
            self._names |= set(names)
            self._digests.add(chunk)
            if self._keeps:
                self._came |= {name: tensor.clone() for name, tensor in chunk}
        self._receiver.release(index)

    def r3_seal(self, sync_id: str, digests: dict[str, int]) -> dict[str, Any]:
        assert self._receiver is not None
        if self._names != self._manifest.keys() or self._digests.result() != digests:
            raise SyncError("not all tensors of the manifest have come as they were sent")
        self._receiver.flush()
        self._state, self._digest = "sealed", combine(digests)
        return {"digest": self._digest}

    def r3_commit(self, sync_id: str) -> dict[str, Any]:
        self.version, self.cause, self.held, self._state = self._next, "", self._came, "committed"
        return {"digest": self._digest}

    def r3_release(self, sync_id: str) -> None:
        self._state = "idle"

    def r3_abort(self, sync_id: str, cause: str) -> None:
        if self._receiver is not None:
            self._receiver.abort()
            self._receiver = None
        self.cause = cause if self._state in ("open", "sealed") else self.cause
        self._state = "poisoned" if self.cause else "idle"


class ReceivingEngine(Engine):
    """Workers in threads of this process.

    Args:
        name: of the engine.
        workers: how many.
        device: where they receive.
        keeps: as of `ReceivingWorker`.
    """

    remedy = ""

    def __init__(self, name: str, workers: int, device: str = "cpu", *, keeps: bool = True) -> None:
        self.name = name
        self.serves = True
        self.workers = [
            ReceivingWorker(f"{name}/{rank}", rank, workers, torch.device(device), keeps=keeps)
            for rank in range(workers)
        ]
        self._threads = [ThreadPoolExecutor(1) for _ in self.workers]
        self._lock = threading.Lock()

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        with self._lock:  # in one order on all workers
            calls = [
                thread.submit(worker.answer, method, args)
                for thread, worker in zip(self._threads, self.workers, strict=True)
            ]
        return [call.result(timeout_s) for call in calls]

    def pause(self, timeout_s: float) -> bool:
        served, self.serves = self.serves, False
        return served

    def resume(self, timeout_s: float) -> None:
        self.serves = True

    def refuse(self, cause: str) -> None: ...

    def reset_caches(self, timeout_s: float) -> None: ...

    def set_weight_version(self, version: int, timeout_s: float) -> None: ...
