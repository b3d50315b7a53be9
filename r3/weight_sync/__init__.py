"""Weight sync: `begin -> chunks -> seal -> commit`, in one layerwise-reload bracket, acknowledged by every worker or
failed."""

from r3.weight_sync.digest import combine, digest
from r3.weight_sync.session import SyncReceipt, WeightSync, gather_all
from r3.weight_sync.source import Weight, WeightSource, adapter_weights, gathered, named_weights
from r3.weight_sync.transports import FilesTransport, GlooTransport, IpcTransport, NcclTransport, Transport

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"
"""For `LLM(worker_extension_cls=...)`: the part of the sync that runs in vLLM's workers."""

__all__ = [
    "WORKER_EXTENSION",
    "FilesTransport",
    "GlooTransport",
    "IpcTransport",
    "NcclTransport",
    "SyncReceipt",
    "Transport",
    "Weight",
    "WeightSource",
    "WeightSync",
    "adapter_weights",
    "combine",
    "digest",
    "gather_all",
    "gathered",
    "named_weights",
]
