"""CUDA IPC: the workers read the trainer's own memory, on the same GPU."""

from typing import Any

import torch

from r3.errors import SyncError
from r3.weight_sync.transports.base import Chunk, Receiver, Transport, Where
from r3.weight_sync.transports.packing import dtype_of


class IpcTransport(Transport):
    """Hands out handles of the chunk's tensors: nothing is packed, and the worker's copy into its weights is the only
    one.

    Handles travel as plain numbers and hexadecimal strings: no pickle, and no setting of vLLM's that allows it.
    """

    name = "ipc"

    def __init__(self) -> None:
        self._published: dict[int, Chunk] = {}

    def publish(self, index: int, chunk: Chunk) -> Where:
        on_gpu = [(name, _on_gpu(tensor.detach())) for name, tensor in chunk]
        # What makes the tensors may still be queued; the workers' streams know nothing of ours.
        for device in {tensor.device for _, tensor in on_gpu}:
            torch.cuda.current_stream(device).synchronize()
        self._published[index] = on_gpu
        return {"tensors": [[name, _handle(name, tensor)] for name, tensor in on_gpu]}

    def release(self, index: int) -> None:
        self._published.pop(index, None)

    def abort(self) -> None:
        self._published.clear()

    def close(self) -> None:
        self.abort()


class IpcReceiver(Receiver):
    owned = False

    def receive(self, where: Where) -> Chunk:
        own = str(torch.cuda.get_device_properties(self.device).uuid)
        return [(name, _opened(name, handle, self.device, own)) for name, handle in where["tensors"]]


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor if tensor.is_cuda else tensor.cuda()).contiguous()


def _handle(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    try:
        shared = tensor.untyped_storage()._share_cuda_()
    except RuntimeError as error:
        raise SyncError(
            f"{name}: its memory cannot be shared with another process ({error}); PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True does that on some systems: unset it, or use another transport"
        ) from error
    return {
        "gpu": str(torch.cuda.get_device_properties(tensor.device).uuid),
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "offset": tensor.storage_offset(),
        # The first is the index that the GPU has in this process: the worker puts in its own.
        "storage": [item.hex() if isinstance(item, bytes) else item for item in shared[1:]],
    }


def _opened(name: str, handle: dict[str, Any], device: torch.device, own: str) -> torch.Tensor:
    if handle["gpu"] != own:
        raise SyncError(
            f"{name} is on GPU {handle['gpu']} and this worker on {own}: `ipc` needs trainer and worker on the same GPU"
            "; use `nccl`"
        )
    memory, size, offset, counter, counter_offset, event, event_sync = handle["storage"]
    index = torch.cuda.current_device() if device.index is None else device.index
    storage = torch.UntypedStorage._new_shared_cuda(
        index,
        bytes.fromhex(memory),
        size,
        offset,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        event_sync,
    )
    shape = handle["shape"]
    empty = torch.empty(0, dtype=dtype_of(handle["dtype"]), device=torch.device("cuda", index))
    return empty.set_(storage, handle["offset"], shape, _contiguous_strides(shape))


def _contiguous_strides(shape: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides[: len(shape)] if shape else []
