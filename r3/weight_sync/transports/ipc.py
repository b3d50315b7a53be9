"""CUDA IPC: the workers read the trainer's own memory, on GPUs of one host."""

import itertools
import uuid
from functools import cache

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from r3.errors import SyncError
from r3.weight_sync.transports.framing import dtype_of
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver, Stop, Transport, gpu_uuid

_ALIGNMENT = 256


class IpcTransport(Transport):
    """Sends handles of memory. A worker on the same GPU copies from there straight into its weights; a worker on
    another GPU of the host first copies to its own GPU.

    Zero-copy weights are shared where they are. What is made for the sync (gathered, cast, merged) is packed into a few
    buffers of a chunk's size, which the workers open once a sync: opening memory takes longer than copying it, and what
    a worker has open the trainer cannot free. The buffers go when the sync ends.

    Handles travel as plain numbers and hexadecimal strings: no pickle, and no setting of vLLM's that allows it.

    Args:
        keep_open: the workers keep zero-copy weights mapped from sync to sync, and need not open each again. Such
            memory that the trainer frees is then released only when the next two syncs have begun: use False if the
            trainer leaves the GPU to the engine in between.
    """

    name = "ipc"
    max_staged_chunks = 2

    def __init__(self, *, keep_open: bool = True) -> None:
        self._connection_id = uuid.uuid4().hex if keep_open else None
        self._numbers = itertools.count()
        # Zero-copy weights that the workers have open, by storage, and which of them this sync has sent.
        self._kept: dict[int, _SharedStorage] = {}
        self._used: set[int] = set()
        self._free: list[_Buffer] = []
        self._staged: dict[int, list[_Buffer]] = {}  # by number of the chunk
        self._flushed = False

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        # The workers closed unused memory at the end of the last sync; new workers have nothing open.
        known = connection_ids == {self._connection_id}
        self._kept = {key: shared for key, shared in self._kept.items() if known and key in self._used}
        self._used = set()
        self._drop_buffers()
        return {"transport": self.name, "connection_id": self._connection_id}

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        shared: list[_SharedStorage] = []
        places: dict[int, int] = {}
        tensors: list[list] = []
        made: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        devices = set()
        for name, sent in chunk:
            tensor = _on_gpu(sent.detach())
            devices.add(tensor.device)
            place = None
            if tensor.nbytes and name in self.zero_copy_names and tensor.data_ptr() == sent.data_ptr():
                storage = tensor.untyped_storage()
                place = places.setdefault(storage._cdata, len(shared))
                if place == len(shared):
                    shared.append(self._lasting(name, storage))
            elif tensor.nbytes:
                made.setdefault(tensor.device, []).append((len(tensors), tensor))
            tensors.append([name, str(tensor.dtype), list(tensor.shape), place, tensor.storage_offset()])
        for device, group in made.items():
            buffer, offsets = self._packed(device, [tensor for _, tensor in group])
            for (number, tensor), offset in zip(group, offsets, strict=True):
                tensors[number][3:] = [len(shared), offset // tensor.itemsize]
            shared.append(buffer.shared)
            self._staged.setdefault(index, []).append(buffer)
        # Kernels that make the tensors may still be queued. A worker that waits for them on its device would wait
        # forever if this process died.
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return {"storages": [item.handle for item in shared], "tensors": tensors}

    def takes_memory(self, chunk: Chunk) -> bool:
        return not all(
            name in self.zero_copy_names and tensor.is_cuda and self.worker_gpus == {gpu_uuid(tensor.device)}
            for name, tensor in chunk
        )

    def release(self, index: int) -> None:
        for number in [number for number in self._staged if number < index]:
            self._free += self._staged.pop(number)
        if self._flushed:  # the workers have answered the seal: they have closed the buffers
            self._drop_buffers()
            if self._connection_id is None:
                self._kept.clear()

    def flush(self, stop: Stop) -> None:
        self._flushed = True

    def abort(self) -> None:
        self._drop_buffers()
        self._kept.clear()
        self._used = set()

    def close(self) -> None:
        self.abort()

    def _lasting(self, name: str, storage: torch.UntypedStorage) -> "_SharedStorage":
        kept = self._kept.get(storage._cdata)
        if kept is None or not kept.is_of(storage):
            kept = self._kept[storage._cdata] = _SharedStorage(name, storage, next(self._numbers), lasts=True)
        self._used.add(storage._cdata)
        return kept

    def _packed(self, device: torch.device, tensors: list[torch.Tensor]) -> tuple["_Buffer", list[int]]:
        """A buffer with copies of `tensors`, and the place of each in it, in bytes."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        *offsets, nbytes = itertools.accumulate(sizes, initial=0)
        buffer = next((b for b in self._free if b.data.device == device and b.data.numel() >= nbytes), None)
        if buffer is None:
            self._free = [b for b in self._free if b.data.device != device]  # too small: larger ones take their place
            room = nbytes + nbytes // 8  # chunks are of nearly one size: most others will fit
            buffer = _Buffer(torch.empty(room, dtype=torch.uint8, device=device), next(self._numbers))
        else:
            self._free.remove(buffer)
        by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for tensor, offset in zip(tensors, offsets, strict=True):
            to, source = by_dtype.setdefault(tensor.dtype, ([], []))
            to.append(buffer.data[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            source.append(tensor)
        for to, source in by_dtype.values():
            torch._foreach_copy_(to, source)
        return buffer, offsets

    def _drop_buffers(self) -> None:
        self._flushed = False
        self._free.clear()
        self._staged.clear()


class _Buffer:
    """Memory for what is made for a sync, and the same as workers know it."""

    def __init__(self, data: torch.Tensor, number: int) -> None:
        self.data = data
        self.shared = _SharedStorage("a buffer of the sync", data.untyped_storage(), number, lasts=False)


class _SharedStorage:
    """Memory that other processes may open, for as long as this lives.

    torch wraps a storage that it shares for good, and one that is shared in every sync would be wrapped once more each
    time: what is shared is another storage of the same memory. And torch counts who has it open, for one process: what
    several have let go of is never freed (seen with 2.11). The count of this is 0 from the start: a sync knows who
    needs what, and for how long.

    Args:
        name: of a tensor in it, for messages.
        storage: is kept alive.
        number: by which workers know it.
        lasts: whether they may keep it open when the sync ends.
    """

    def __init__(self, name: str, storage: torch.UntypedStorage, number: int, *, lasts: bool) -> None:
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
        self.handle: Descriptor = {
            "number": number,
            "lasts": lasts,
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
        self._open: dict[int, _MappedStorage] = {}  # by number
        self._lasting: set[int] = set()  # of these, what this sync has sent and the next may send again

    def receive(self, where: Descriptor) -> Chunk:
        first = where["tensors"][0][0] if where["tensors"] else ""
        opened = [self._opened(first, handle) for handle in where["storages"]]
        return [
            (name, self._tensor(None if place is None else opened[place], dtype, shape, offset))
            for name, dtype, shape, place, offset in where["tensors"]
        ]

    def flush(self) -> None:
        # torch lets go of another process's memory once the current stream has done all that is queued there.
        torch.cuda.current_stream(self.device).synchronize()
        kept = self._lasting if self.connection_id is not None else set()
        self._open = {number: opened for number, opened in self._open.items() if number in kept}
        self._lasting = set()

    def abort(self) -> None:
        self._open.clear()

    def _opened(self, name: str, handle: Descriptor) -> "_MappedStorage":
        memory, size, offset, counter, counter_offset, event, event_sync = handle["storage"]
        number = handle["number"]
        if handle["lasts"]:
            self._lasting.add(number)
        if number in self._open:
            return self._open[number]
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
        opened = self._open[number] = _MappedStorage(storage)
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
