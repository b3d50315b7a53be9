"""What a worker knows of the sync that it takes part in, and of the weights that it holds."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from r3.weight_sync.delta import Base
from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.timing import Clock
from r3.weight_sync.transports import Receiver
from r3.weight_sync.worker.engine_models import EngineModels, EngineReload


@dataclass
class ReceivedSync:
    """A sync that has reserved this worker."""

    id: str
    version: int
    sender: str
    lease_s: float
    stage: str = "reserved"
    manifest: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    reload: EngineReload | None = None
    kept: frozenset[str] = frozenset()  # layers that get nothing on purpose
    base: Base | None = None
    digests: ContentDigests = field(default_factory=ContentDigests)
    clock: Clock = field(default_factory=Clock)
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
    base: Base | None = None

    @property
    def name(self) -> str:
        if self.sync is not None:
            return self.sync.stage
        return "poisoned" if self.cause else "idle"

    @property
    def why_no_batch(self) -> str:
        """Why no batch may run on the weights as they are now; empty if one may."""
        if self.sync is not None and self.sync.stage in ("open", "sealed"):
            return f"a sync of version {self.sync.version} by {self.sync.sender} is {self.sync.stage}"
        return self.cause
