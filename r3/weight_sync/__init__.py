"""Weight sync: one layerwise-reload bracket, sealed and committed on every worker of every engine, or an error."""

from r3.weight_sync.engines import Engine, engine_of
from r3.weight_sync.integrity.digest import ContentDigests, combine, digest
from r3.weight_sync.quantization.fp8 import quantised
from r3.weight_sync.sender.chunking import gather_all
from r3.weight_sync.sender.session import SyncReceipt, WeightSync
from r3.weight_sync.transports import FilesTransport, GlooTransport, IpcTransport, NcclTransport, Transport
from r3.weight_sync.weights.named import Weight, WeightSource, adapter_weights, gathered, named_weights

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"
"""For `LLM(worker_extension_cls=...)`: the part of the sync that runs in vLLM's workers."""

__all__ = [
    "WORKER_EXTENSION",
    "ContentDigests",
    "Engine",
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
    "engine_of",
    "gather_all",
    "gathered",
    "named_weights",
    "quantised",
]
