"""Weight sync: one layerwise-reload bracket, sealed and committed on every worker of every engine, or an error."""

from r3.entry_points import WORKER_EXTENSION
from r3.weight_sync.engines import Engine, engine_of
from r3.weight_sync.integrity.digest import ContentDigests, combine, digest
from r3.weight_sync.quantization.fp8 import quantised
from r3.weight_sync.sender.chunking import gather_all
from r3.weight_sync.sender.ranks import SyncRanks
from r3.weight_sync.sender.session import SyncReceipt, WeightSync
from r3.weight_sync.transports import (
    FilesTransport,
    GlooTransport,
    InProcessTransport,
    IpcTransport,
    NcclTransport,
    Transport,
)
from r3.weight_sync.transports.group import local_address
from r3.weight_sync.weights.named import LazyWeight, Weight, adapter_weights, gathered, named_weights

__all__ = [
    "WORKER_EXTENSION",
    "ContentDigests",
    "Engine",
    "FilesTransport",
    "GlooTransport",
    "InProcessTransport",
    "IpcTransport",
    "LazyWeight",
    "NcclTransport",
    "SyncRanks",
    "SyncReceipt",
    "Transport",
    "Weight",
    "WeightSync",
    "adapter_weights",
    "combine",
    "digest",
    "engine_of",
    "gather_all",
    "gathered",
    "local_address",
    "named_weights",
    "quantised",
]
