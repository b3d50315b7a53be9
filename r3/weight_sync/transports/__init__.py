"""The ways of a sync's bytes: one interface, one file a medium, one suite of tests that all pass."""

from r3.errors import SyncError
from r3.weight_sync.transports.base import Announced, Chunk, Receiver, Transport, Where
from r3.weight_sync.transports.broadcast import GlooReceiver, GlooTransport, NcclReceiver, NcclTransport
from r3.weight_sync.transports.files import FilesReceiver, FilesTransport
from r3.weight_sync.transports.ipc import IpcReceiver, IpcTransport

TRANSPORTS: dict[str, type[Transport]] = {
    t.name: t for t in (FilesTransport, GlooTransport, IpcTransport, NcclTransport)
}
RECEIVERS: dict[str, type[Receiver]] = {
    "files": FilesReceiver,
    "gloo": GlooReceiver,
    "ipc": IpcReceiver,
    "nccl": NcclReceiver,
}


def transport_of(transport: "str | Transport") -> Transport:
    """A transport by name, or as it is."""
    if isinstance(transport, Transport):
        return transport
    if transport not in TRANSPORTS:
        raise SyncError(f"transport: expected one of {sorted(TRANSPORTS)}, got {transport!r}")
    return TRANSPORTS[transport]()


__all__ = [
    "RECEIVERS",
    "TRANSPORTS",
    "Announced",
    "Chunk",
    "FilesTransport",
    "GlooTransport",
    "IpcTransport",
    "NcclTransport",
    "Receiver",
    "Transport",
    "Where",
    "transport_of",
]
