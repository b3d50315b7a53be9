"""NCCL broadcasts through NCCL's C API.

Not by `torch.distributed`: what fails in any of its NCCL groups makes the heartbeat monitor of the process's first one
end the process some minutes later (torch 2.11, `ProcessGroupNCCL::HeartbeatMonitor::runLoop`; the flag is one for all
groups, whatever TORCH_NCCL_DUMP_ON_TIMEOUT says). A sync that failed would end a trainer, or an engine's worker.

The communicator does not block: no call waits for a peer, and `abort` ends transfers in flight at any time.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.transports.group import Group
from r3.weight_sync.transports.transport import Descriptor, wait_until

_ABORT_S = 10.0
_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t
_UINT8 = 1  # ncclDataType_t
_ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES


class NcclGroup(Group):
    """A group of GPUs. Broadcasts are queued on a stream of their own."""

    def _connect(self, store: dist.TCPStore, offer: Descriptor) -> None:
        if self._rank == 0:
            store.set("id", unique_id().hex())
        self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device):
            self._communicator = Communicator(bytes.fromhex(store.get("id").decode()), self._rank, self.size)
        try:
            self._until_ready("the connections")
        except SyncError:
            self.abort()
            raise

    def broadcast(self, blocks: list[Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._run(blocks)

    def receive(self, sizes: list[int]) -> list[Tensor]:
        # Memory of the receiving stream, so that it need not wait for what the current one still loads.
        with torch.cuda.stream(self._stream):
            blocks = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        self._run(blocks)
        current = torch.cuda.current_stream(self._device)
        for block in blocks:
            block.record_stream(current)
        current.wait_stream(self._stream)
        return blocks

    def _run(self, blocks: list[Tensor]) -> None:
        with torch.cuda.device(self._device):
            self._communicator.broadcast([block for block in blocks if block.numel()], self._stream)
            # NCCL launches from a thread of its own; until it has, nothing may come behind it in the stream.
            self._until_ready("the launch of a broadcast")
            behind = torch.cuda.Event()
            behind.record(self._stream)
        self._in_flight.append((behind, blocks))

    def _until_ready(self, operation: str) -> None:
        wait_until(self._communicator.ready, lambda: False, self._timeout_s, f"{operation} among {self.size} ranks")

    def _done(self, under_way: Any) -> bool:
        behind, _ = under_way
        if behind.query():
            return True
        self._communicator.ready()  # raises after a failure: the kernel then waits for its peer, and for ever
        return False

    def abort(self) -> None:
        def end(blocks: list[Any]) -> None:
            with torch.cuda.device(self._device):
                self._communicator.abort()
            blocks.clear()  # not before: until it has ended, a broadcast may write to its memory

        # It waits for kernels in flight.
        thread = threading.Thread(target=end, args=(list(self._in_flight),), daemon=True)
        thread.start()
        self._in_flight.clear()
        thread.join(_ABORT_S)


class Communicator:
    """A communicator of NCCL that does not block, on the current device."""

    def __init__(self, of: bytes, rank: int, size: int) -> None:
        self._handle = ctypes.c_void_p()
        config = _Config(size=ctypes.sizeof(_Config), magic=0xCAFEBEEF, version=21400, blocking=0)
        _checked(
            _library().ncclCommInitRankConfig(
                ctypes.byref(self._handle), size, _Id.from_buffer_copy(of), rank, ctypes.byref(config)
            )
        )

    def broadcast(self, blocks: list[Tensor], stream: torch.cuda.Stream) -> None:
        """Begin to broadcast uint8 `blocks` from rank 0 on `stream`: queued once the communicator is `ready`."""
        library = _library()
        _checked(library.ncclGroupStart())
        try:
            for block in blocks:
                at = block.data_ptr()
                _checked(library.ncclBroadcast(at, at, block.numel(), _UINT8, 0, self._handle, stream.cuda_stream))
        finally:
            ended = library.ncclGroupEnd()  # or what this thread asks of NCCL next would belong to the group
        _checked(ended, self._handle)

    def ready(self) -> bool:
        """Whether the last call has completed. Raises errors of earlier calls too, and of transfers in flight."""
        state = ctypes.c_int(_SUCCESS)
        _checked(_library().ncclCommGetAsyncError(self._handle, ctypes.byref(state)), self._handle)
        _checked(state.value, self._handle)
        return state.value == _SUCCESS

    def abort(self) -> None:
        """End transfers in flight and free the communicator."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            _library().ncclCommAbort(handle)


def unique_id() -> bytes:
    """A new id for a communicator: rank 0 makes it, and all ranks need it."""
    new_id = _Id()
    _checked(_library().ncclGetUniqueId(ctypes.byref(new_id)))
    return bytes(new_id)


class _Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * _ID_BYTES)]


class _Config(ctypes.Structure):
    """`ncclConfig_t` of NCCL 2.14, which later ones take too: they know it by its version."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnccl.so.2")  # torch has loaded it
    except OSError as error:
        raise SyncError(
            f"NCCL is not there: {error}. Builds of torch for CUDA bring it; with one that has it built in, install "
            "nvidia-nccl-cu12 or -cu13, or use another transport"
        ) from error
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.ncclGetUniqueId.argtypes = [pointer]
    library.ncclCommInitRankConfig.argtypes = [pointer, number, _Id, number, pointer]
    library.ncclBroadcast.argtypes = [pointer, pointer, count, number, number, pointer, pointer]
    library.ncclCommGetAsyncError.argtypes = [pointer, pointer]
    library.ncclCommAbort.argtypes = [pointer]
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [number], ctypes.c_char_p
    library.ncclGetLastError.argtypes, library.ncclGetLastError.restype = [pointer], ctypes.c_char_p
    return library


def _checked(result: int, handle: ctypes.c_void_p | None = None) -> None:
    if result in (_SUCCESS, _IN_PROGRESS):
        return
    messages = [_library().ncclGetErrorString(result), _library().ncclGetLastError(handle)]
    raise SyncError("NCCL: " + "; ".join(text.decode(errors="replace").strip() for text in messages if text))
