"""CUDA IPC: the workers read the trainer's own memory, on GPUs of one host."""

import itertools
import uuid
from collections import deque
from contextlib import ExitStack
from functools import cache

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from r3.errors import SyncError
from r3.weight_sync.transports.framing import dtype_of
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver, Transport, gpu_uuid


class IpcTransport(Transport):
    """Sends handles of the chunk's tensors, without packing them. A worker on the same GPU copies them straight into
    its weights; a worker on another GPU of the host first copies them to its own GPU.

    Handles travel as plain numbers and hexadecimal strings: no pickle, and no setting of vLLM's that allows it.

    Args:
        keep_open: the workers keep the trainer's memory mapped from sync to sync, and need not open each allocation
            again. Memory that the trainer frees is then released only when the next two syncs have begun: use False if
            the trainer leaves the GPU to the engine in between.
    """

    name = "ipc"
    max_staged_chunks = 2

    def __init__(self, *, keep_open: bool = True) -> None:
        self._connection_id = uuid.uuid4().hex if keep_open else None
        self._numbers = itertools.count()
        self._published: dict[int, list[_SharedStorage]] = {}
        # Memory that the workers keep open: by storage if it is zero-copy, else one storage per allocation.
        self._kept: dict[int | str, _SharedStorage] = {}
        self._used: set[int | str] = set()

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        # The workers closed unused memory at the end of the last sync; new workers have nothing open.
        known = connection_ids == {self._connection_id}
        self._kept = {key: shared for key, shared in self._kept.items() if known and key in self._used}
        self._used = set()
        return {"transport": self.name, "connection_id": self._connection_id}

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        on_gpu = [(name, tensor, _on_gpu(tensor.detach())) for name, tensor in chunk]
        # Kernels that make the tensors may still be queued. A worker that waits for them on its device would wait
        # forever if this process died.
        for device in {tensor.device for _, _, tensor in on_gpu}:
            torch.cuda.current_stream(device).synchronize()
        places: dict[int, int] = {}
        shared: list[_SharedStorage] = []
        tensors = []
        for name, sent, tensor in on_gpu:
            storage, place = tensor.untyped_storage(), None
            if tensor.nbytes:
                place = places.setdefault(storage._cdata, len(shared))
                if place == len(shared):
                    lasts = name in self.zero_copy_names and tensor.data_ptr() == sent.data_ptr()
                    shared.append(self._shared(name, storage, lasts))
            tensors.append([name, str(tensor.dtype), list(tensor.shape), place, tensor.storage_offset()])
        self._published[index] = shared
        return {"storages": [item.handle for item in shared], "tensors": tensors}

    def takes_memory(self, chunk: Chunk) -> bool:
        return not all(
            name in self.zero_copy_names and tensor.is_cuda and self.worker_gpus == {gpu_uuid(tensor.device)}
            for name, tensor in chunk
        )

    def release(self, index: int) -> None:
        self._published = {number: kept for number, kept in self._published.items() if number >= index}

    def abort(self) -> None:
        self._published.clear()
        self._kept.clear()
        self._used = set()

    def close(self) -> None:
        self.abort()

    def _shared(self, name: str, storage: torch.UntypedStorage, lasts: bool) -> "_SharedStorage":
        if self._connection_id is None:
            return _SharedStorage(name, storage)
        if not lasts:
            shared = _SharedStorage(name, storage)
            self._kept.setdefault(shared.allocation, shared)
            self._used.add(shared.allocation)
            return shared
        kept = self._kept.get(storage._cdata)
        if kept is None or not kept.is_of(storage):
            kept = self._kept[storage._cdata] = _SharedStorage(name, storage, next(self._numbers))
        self._used.add(storage._cdata)
        return kept


class _SharedStorage:
    """Memory that other processes may open, for as long as this lives.

    torch wraps a storage that it shares for good, and one that is shared in every sync would be wrapped once more each
    time: what is shared is another storage of the same memory. And torch counts who has it open, for one process: what
    several have let go of is never freed (seen with 2.11). The count of this is 0 from the start: a sync knows who
    needs what, and for how long.

    Args:
        name: of a tensor in it, for messages.
        storage: is kept alive.
        number: by which workers know it from sync to sync; None if they do not keep it.
    """

    def __init__(self, name: str, storage: torch.UntypedStorage, number: int | None = None) -> None:
        all_bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyrefly: ignore
        self._alias = from_dlpack(to_dlpack(all_bytes)).untyped_storage()
        try:
            shared = self._alias._share_cuda_()
        except RuntimeError as error:
            raise SyncError(
                f"{name}: its memory cannot be shared with another process ({error}); PYTORCH_CUDA_ALLOC_CONF="
                "expandable_segments:True does that on some systems: unset it, or use another transport"
            ) from error
        # The first field is the index that the GPU has in this process: the worker puts in its own.
        _, memory, size, offset, *counter, event, event_sync = shared
        torch.UntypedStorage._release_ipc_counter(*counter, device=storage.device)
        fields = [memory, size, offset, *_counter()[:2], event, event_sync]
        self.allocation: str = memory.hex()
        self.handle: Descriptor = {
            "number": number,
            "gpu": gpu_uuid(storage.device),
            "storage": [item.hex() if isinstance(item, bytes) else item for item in fields],
        }

    def is_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether `storage`, the same object as was shared, still has the same memory."""
        return (storage.data_ptr(), storage.nbytes()) == (self._alias.data_ptr(), self._alias.nbytes())


class IpcReceiver(Receiver):
    takes_memory = False

    def __init__(self, offer: Descriptor, rank: int, device: torch.device, timeout_s: float) -> None:
        super().__init__(offer, rank, device, timeout_s)
        self.connection_id = offer["connection_id"]
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        self._gpus = {str(gpu_uuid(gpu)): gpu.index for gpu in gpus}
        # By number, or, one of each allocation, by that: torch keeps it mapped for as long as a storage in it lives.
        self._open: dict[int | str, _MappedStorage] = {}
        self._used: set[int | str] = set()
        self._chunks: deque[list[_MappedStorage]] = deque()
        self._released = 0
        self._idle: dict[torch.device, torch.cuda.Stream] = {}

    def receive(self, where: Descriptor) -> Chunk:
        first = where["tensors"][0][0] if where["tensors"] else ""
        opened = [self._opened(first, handle) for handle in where["storages"]]
        self._chunks.append(opened)
        return [
            (name, self._tensor(None if place is None else opened[place], dtype, shape, offset))
            for name, dtype, shape, place, offset in where["tensors"]
        ]

    def release(self, index: int) -> None:
        # torch lets go of another process's memory once the current stream has done all that is queued there, and the
        # host waits for it: here for a stream on which nothing is.
        with ExitStack() as idle:
            for stream in self._idle.values():
                idle.enter_context(torch.cuda.stream(stream))
            while self._released < index and self._chunks:
                self._chunks.popleft()
                self._released += 1

    def flush(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        self._chunks.clear()
        self._released = 0
        self._open = {key: opened for key, opened in self._open.items() if key in self._used}
        self._used = set()
        if self.connection_id is None:
            self._open.clear()

    def abort(self) -> None:
        self._chunks.clear()
        self._open.clear()

    def _opened(self, name: str, handle: Descriptor) -> "_MappedStorage":
        memory, size, offset, counter, counter_offset, event, event_sync = handle["storage"]
        key = memory if handle["number"] is None else handle["number"]
        self._used.add(key)
        if key in self._open and handle["number"] is not None:
            return self._open[key]
        gpu = self._gpus.get(handle["gpu"])
        if gpu is None:
            raise SyncError(
                f"{name} is on GPU {handle['gpu']}, and this worker sees only {', '.join(self._gpus)}: `ipc` needs the "
                "trainer's GPU among these (CUDA_VISIBLE_DEVICES); or use `nccl`"
            )
        storage = torch.UntypedStorage._new_shared_cuda(
            gpu,
            bytes.fromhex(memory),
            size,
            offset,
            bytes.fromhex(counter),
            counter_offset,
            bytes.fromhex(event),
            event_sync,
        )
        opened = _MappedStorage(storage)
        self._open.setdefault(key, opened)
        if storage.device not in self._idle:
            self._idle[storage.device] = torch.cuda.Stream(storage.device)
        return opened

    def _tensor(self, opened: "_MappedStorage | None", dtype: str, shape: list[int], offset: int) -> torch.Tensor:
        if opened is None:
            return torch.empty(shape, dtype=dtype_of(dtype), device=self.device)
        return opened.tensor(dtype, shape, offset).to(self.device, non_blocking=True)


class _MappedStorage:
    """Mapped memory of another process. Its tensors are kept from sync to sync, since making one takes 9 us."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._tensors: dict[tuple[str | int, ...], torch.Tensor] = {}

    def tensor(self, dtype: str, shape: list[int], offset: int) -> torch.Tensor:
        key = (dtype, *shape, offset)
        if key not in self._tensors:
            empty = torch.empty(0, dtype=dtype_of(dtype), device=self._storage.device)
            self._tensors[key] = empty.set_(self._storage, offset, shape)  # pyrefly: ignore
        return self._tensors[key]


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor if tensor.is_cuda else tensor.cuda()).contiguous()


@cache
def _counter() -> tuple[bytes, int, torch.UntypedStorage]:
    """The counter on which workers release memory, which is never read, and its storage."""
    storage = torch.empty(1, device="cuda").untyped_storage()
    _, _, _, _, handle, offset, _, _ = storage._share_cuda_()
    return handle, offset, storage
