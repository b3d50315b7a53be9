"""CUDA IPC: the workers read the trainer's own memory, on GPUs of one host."""

import uuid
from typing import Any

import torch

from r3.errors import SyncError
from r3.weight_sync.transports.base import Chunk, Receiver, Transport, Where
from r3.weight_sync.transports.packing import dtype_of


class IpcTransport(Transport):
    """Hands out handles of the chunk's tensors: nothing is packed, and a worker on the same GPU copies them into its
    weights at once. A worker on another GPU of the host first fetches them, from GPU to GPU.

    Handles travel as plain numbers and hexadecimal strings: no pickle, and no setting of vLLM's that allows it.

    Args:
        keep_open: the workers keep the trainer's memory mapped from sync to sync, and need not open each allocation
            again. What the trainer frees is then free only after the next sync: False where the trainer leaves the
            GPU to the engine in between.
    """

    name = "ipc"
    most_ready = 2

    def __init__(self, *, keep_open: bool = True) -> None:
        self._generation = uuid.uuid4().hex if keep_open else None
        self._published: dict[int, Chunk] = {}

    def offer(self, workers: int, generations: set[str | None]) -> Where:
        return {"transport": self.name, "generation": self._generation}

    def publish(self, index: int, chunk: Chunk) -> Where:
        on_gpu = [(name, _on_gpu(tensor.detach())) for name, tensor in chunk]
        # What makes the tensors may still be queued; the workers' streams know nothing of ours.
        for device in {tensor.device for _, tensor in on_gpu}:
            torch.cuda.current_stream(device).synchronize()
        self._published[index] = on_gpu
        return {"tensors": [[name, _handle(name, tensor)] for name, tensor in on_gpu]}

    def release(self, index: int) -> None:
        self._published = {number: chunk for number, chunk in self._published.items() if number >= index}

    def abort(self) -> None:
        self._published.clear()

    def close(self) -> None:
        self.abort()


class IpcReceiver(Receiver):
    def __init__(self, offer: Where, rank: int, device: torch.device, timeout_s: float) -> None:
        super().__init__(offer, rank, device, timeout_s)
        self.generation = offer["generation"]
        self._gpus = {
            str(torch.cuda.get_device_properties(index).uuid): index for index in range(torch.cuda.device_count())
        }
        # By allocation: torch keeps one mapped for as long as a storage in it lives.
        self._open: dict[str, torch.UntypedStorage] = {}
        self._used: set[str] = set()

    def receive(self, where: Where) -> Chunk:
        return [(name, self._opened(name, handle)) for name, handle in where["tensors"]]

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        self._open = {memory: storage for memory, storage in self._open.items() if memory in self._used}
        self._used = set()
        if self.generation is None:
            self._open.clear()

    def abort(self) -> None:
        self._open.clear()

    def _opened(self, name: str, handle: dict[str, Any]) -> torch.Tensor:
        gpu = self._gpus.get(handle["gpu"])
        if gpu is None:
            raise SyncError(
                f"{name} is on GPU {handle['gpu']}, and this worker sees only {', '.join(self._gpus)}: `ipc` needs the "
                "trainer's GPU among these (CUDA_VISIBLE_DEVICES); or use `nccl`"
            )
        shape, dtype = handle["shape"], dtype_of(handle["dtype"])
        if handle["storage"] is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory = handle["storage"][0]
        storage = _open_storage(handle["storage"], gpu)
        self._open.setdefault(memory, storage)
        self._used.add(memory)
        tensor = torch.empty(0, dtype=dtype, device=storage.device)
        tensor.set_(storage, handle["offset"], shape, _contiguous_strides(shape))
        return tensor.to(self.device, non_blocking=True)


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor if tensor.is_cuda else tensor.cuda()).contiguous()


def _handle(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    described = {
        "gpu": str(torch.cuda.get_device_properties(tensor.device).uuid),
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "offset": tensor.storage_offset(),
        "storage": None,
    }
    if not tensor.nbytes:
        return described
    try:
        shared = tensor.untyped_storage()._share_cuda_()
    except RuntimeError as error:
        raise SyncError(
            f"{name}: its memory cannot be shared with another process ({error}); PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True does that on some systems: unset it, or use another transport"
        ) from error
    # The first field is the index that the GPU has in this process: the worker puts in its own.
    return described | {"storage": [item.hex() if isinstance(item, bytes) else item for item in shared[1:]]}


def _open_storage(fields: list[Any], gpu: int) -> torch.UntypedStorage:
    memory, size, offset, counter, counter_offset, event, event_sync = fields
    return torch.UntypedStorage._new_shared_cuda(
        gpu,
        bytes.fromhex(memory),
        size,
        offset,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        event_sync,
    )


def _contiguous_strides(shape: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides[: len(shape)] if shape else []
