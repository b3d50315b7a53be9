"""A worker's state: the sync that it takes part in, and the weights that it holds."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from r3.weight_sync.delta import DeltaBase
from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.states import SyncState
from r3.weight_sync.timing import StageTimer
from r3.weight_sync.transports import Receiver
from r3.weight_sync.worker.engine_models import EngineModels, EngineReload


@dataclass
class ReceivedSync:
    """A sync that has reserved this worker."""

    id: str
    version: int
    sender: str
    lease_s: float
    state: SyncState = SyncState.RESERVED
    manifest: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    reload: EngineReload | None = None
    kept: frozenset[str] = frozenset()  # layers that get nothing on purpose
    base: DeltaBase | None = None
    digests: ContentDigests = field(default_factory=ContentDigests)
    clock: StageTimer = field(default_factory=StageTimer)
    received: set[str] = field(default_factory=set)
    chunks: int = 0
    touched: bool = False
    uninitialised: Callable[[], list[str]] = list  # what the finished layers have got no values for
    sealed: int | None = None
    loaded: Any = None  # CUDA event after the copies of the last call
    until: float = 0.0

    def renew(self) -> None:
        self.until = time.monotonic() + self.lease_s


@dataclass
class WorkerState:
    worker: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    version: int | None = None  # committed
    cause: str = ""  # of the poisoning; empty if the weights can be trusted
    untouched: frozenset[str] = frozenset()  # layers that no failed sync since the last commit may have touched
    sync: ReceivedSync | None = None
    given_up: str = ""  # id of the last sync that was aborted
    receiver: Receiver | None = None
    models: EngineModels | None = None
    base: DeltaBase | None = None

    @property
    def state(self) -> SyncState:
        if self.sync is not None:
            return self.sync.state
        return SyncState.POISONED if self.cause else SyncState.IDLE

    @property
    def why_no_batch(self) -> str:
        """Why no batch may run on the current weights; empty if one may."""
        if self.sync is not None and self.sync.state in (SyncState.OPEN, SyncState.SEALED):
            return f"a sync of version {self.sync.version} by {self.sync.sender} is {self.sync.state}"
        return self.cause
