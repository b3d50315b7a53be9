"""Weight transports: one interface, one file per medium, one conformance suite that all of them pass."""

from collections.abc import Mapping
from types import MappingProxyType

from r3.errors import SyncError
from r3.weight_sync.transports.broadcast import GlooReceiver, GlooTransport, NcclReceiver, NcclTransport
from r3.weight_sync.transports.files import FilesReceiver, FilesTransport
from r3.weight_sync.transports.from_ranks import RanksReceiver
from r3.weight_sync.transports.in_process import InProcessReceiver, InProcessTransport
from r3.weight_sync.transports.ipc import IpcReceiver, IpcTransport
from r3.weight_sync.transports.transport import Announced, Chunk, Descriptor, Receiver, Transport

TRANSPORTS: Mapping[str, type[Transport]] = MappingProxyType(
    {t.name: t for t in (FilesTransport, GlooTransport, InProcessTransport, IpcTransport, NcclTransport)}
)
_receivers: dict[str, type[Receiver]] = {
    "files": FilesReceiver,
    "gloo": GlooReceiver,
    "in_process": InProcessReceiver,
    "ipc": IpcReceiver,
    "nccl": NcclReceiver,
    "ranks": RanksReceiver,
}
RECEIVERS: Mapping[str, type[Receiver]] = MappingProxyType(_receivers)
"""By the transport's name; a worker looks here for what its trainer offers. `register_receiver` adds to it."""


def register_receiver(name: str, receiver: type[Receiver]) -> None:
    """Register the worker's side of a custom transport, in the module that the worker's extension is defined in.

    Args:
        name: the `Transport.name` of the trainer's side.
        receiver: the class. The same one may be registered again.

    Raises:
        SyncError: no receiver, or another one has the name.
    """
    if not (isinstance(receiver, type) and issubclass(receiver, Receiver)):
        raise SyncError(f"receiver of {name!r}: expected a subclass of Receiver, got {receiver!r:.80}")
    known = _receivers.setdefault(name, receiver)
    if known is not receiver:
        raise SyncError(f"receiver of {name!r}: expected a new name, got that of {known.__module__}.{known.__name__}")


def transport_of(transport: "str | Transport") -> Transport:
    """The transport of that name; a `Transport` is returned unchanged."""
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
    "Descriptor",
    "FilesTransport",
    "GlooTransport",
    "InProcessTransport",
    "IpcTransport",
    "NcclTransport",
    "Receiver",
    "Transport",
    "register_receiver",
    "transport_of",
]
