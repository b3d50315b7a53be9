"""Weight sync: `begin -> chunks -> commit`, in one layerwise-reload bracket, acknowledged by every worker or failed.

Limits of this version:
1. Engines: `vllm.LLM`. Transports: `files`, for engines on the same host or with a shared folder.
2. A worker that saw a failure is poisoned and says so; what was in flight in the engine is not stopped.
3. Quantised engines are refused.
"""

from r3.weight_sync.digest import combine, digest
from r3.weight_sync.session import SyncReceipt, WeightSync, gathered
from r3.weight_sync.transport import FilesTransport, Transport

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"
"""For `LLM(worker_extension_cls=...)`: the part of the sync that runs in vLLM's workers."""

__all__ = [
    "WORKER_EXTENSION",
    "FilesTransport",
    "SyncReceipt",
    "Transport",
    "WeightSync",
    "combine",
    "digest",
    "gathered",
]
