"""What the sender of a sync and vLLM's workers agree on: the states of a worker, and what travels between them.

A sync is a two-phase commit. Calls go to all workers of all engines at a time; what goes and comes is plain data, of
which JSON is enough.

    call                 worker's state after it
    r3_status            as it was
    r3_reserve           RESERVED   kept for this sync, for the length of a lease that each call renews
    r3_begin             OPEN       vLLM's reload bracket is open; batches are refused
    r3_load (each chunk) OPEN
    r3_seal              SEALED     prepared: everything has come, as it was sent
    r3_commit            COMMITTED  the new weights are the engine's; batches may run
    r3_release           IDLE
    r3_abort             IDLE if no weight was touched, else POISONED: batches are refused until a sync commits

The sender pauses the engine once it has reserved it and resumes it before the release, so that no two senders do so at
a time. A sync whose sender is silent for longer than its lease is taken over by the next one.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

Reply = dict[str, Any]
"""What one worker answers to a call: its state and place, and what the call gives; `error` where it failed."""
Manifest = Mapping[str, tuple[tuple[int, ...], str]]
"""Of all tensors that will be sent: name -> shape, dtype as `str(tensor.dtype)`."""


class SyncState(str, Enum):
    """Of a worker. Its value is what travels."""

    IDLE = "idle"
    RESERVED = "reserved"
    OPEN = "open"
    SEALED = "sealed"
    COMMITTED = "committed"
    POISONED = "poisoned"

    def __str__(self) -> str:
        return self.value
