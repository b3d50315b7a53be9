"""Weight sync: one layerwise-reload bracket, sealed and committed on every worker of every engine, or an error."""

from r3.entry_points import WORKER_EXTENSION
from r3.weight_sync.digest import ContentDigests, combine, digest
from r3.weight_sync.engines import Engine, engine_of
from r3.weight_sync.fp8 import quantised
from r3.weight_sync.outgoing import gather_all
from r3.weight_sync.session import SyncReceipt, WeightSync
from r3.weight_sync.source import Weight, WeightSource, adapter_weights, gathered, named_weights
from r3.weight_sync.transports import FilesTransport, GlooTransport, IpcTransport, NcclTransport, Transport

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
