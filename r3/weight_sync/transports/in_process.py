"""Tensors handed over as they are, to workers in the trainer's own process."""

import uuid
from weakref import WeakValueDictionary

import torch

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver, Transport, gpu_uuid

_senders: "WeakValueDictionary[str, InProcessTransport]" = WeakValueDictionary()
# What goes with a call is plain data: a receiver finds its sender here.


class InProcessTransport(Transport):
    """For a `vllm.LLM` whose worker is in the trainer's process: started by an external launcher, or with its engine
    core in this process too (`VLLM_ENABLE_V1_MULTIPROCESSING=0`).

    Nothing is written or packed: the worker copies from the trainer's tensors into its weights, on the CPU and on a
    GPU. (`ipc` cannot do this: CUDA does not open a process's memory in that process.)
    """

    name = "in_process"
    max_staged_chunks = 2

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._published: dict[int, Chunk] = {}
        _senders[self._id] = self

    def offer(self, workers: int, connection_ids: set[str | None]) -> Descriptor:
        return {"transport": self.name, "sender": self._id}

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        # The worker copies on a stream of its own, which does not wait for kernels that make the tensors.
        for device in {tensor.device for _, tensor in chunk if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._published[index] = [(name, tensor.detach()) for name, tensor in chunk]
        return {"index": index}

    def published(self, index: int) -> Chunk:
        """Chunk number `index`, until it is released."""
        if index not in self._published:
            raise SyncError(f"chunk {index}: expected one of {sorted(self._published)}: it was released, or never came")
        return self._published[index]

    def takes_memory(self, chunk: Chunk) -> bool:
        return not all(
            name in self.zero_copy_names and self.worker_gpus == {gpu_uuid(tensor.device)} for name, tensor in chunk
        )

    def release(self, index: int) -> None:
        self._published = {number: kept for number, kept in self._published.items() if number >= index}

    def abort(self) -> None:
        self._published.clear()

    def close(self) -> None:
        self.abort()


class InProcessReceiver(Receiver):
    def __init__(self, offer: Descriptor, rank: int, device: torch.device, timeout_s: float) -> None:
        super().__init__(offer, rank, device, timeout_s)
        sender = _senders.get(offer["sender"])
        if sender is None:
            raise SyncError(
                "in_process: expected a worker in the trainer's own process (an LLM of an external launcher, or made "
                "under VLLM_ENABLE_V1_MULTIPROCESSING=0), got one in another: use ipc on the trainer's GPU, nccl "
                "between GPUs, or files"
            )
        self._sender = sender

    def receive(self, where: Descriptor) -> Chunk:
        chunk = self._sender.published(where["index"])
        return [(name, tensor.to(self.device, non_blocking=True)) for name, tensor in chunk]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
