"""The states of a worker in a sync, and the calls that lead from one to the next.

A sync is a two-phase commit. Each call goes to all workers of all engines at once. What travels is plain
data (`r3.weight_sync.protocol`).

    call                 worker's state after it
    r3_status            as it was
    r3_reserve           RESERVED   kept for this sync, for the length of a lease that each call renews
    r3_begin             OPEN       vLLM's reload bracket is open; batches are refused
    r3_load (each chunk) OPEN
    r3_seal              SEALED     prepared: every tensor has arrived as it was sent
    r3_commit            COMMITTED  the new weights are the engine's; batches may run
    r3_release           IDLE
    r3_abort             IDLE if no weight was touched, else POISONED: batches are refused until a sync commits

The sender pauses an engine after it has reserved it, and resumes it before it releases it: no two senders pause and
resume one engine at the same time. If a sender is silent for longer than its lease, the next one may take over.
"""

from enum import Enum


class SyncState(str, Enum):
    """State of a worker. The value is what replies carry."""

    IDLE = "idle"
    RESERVED = "reserved"
    OPEN = "open"
    SEALED = "sealed"
    COMMITTED = "committed"
    POISONED = "poisoned"

    def __str__(self) -> str:
        return self.value
