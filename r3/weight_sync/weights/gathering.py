"""Gathers a sharded weight to one rank, its owner, instead of to all.

Every rank of the mesh makes each weight, in the same order. On the ranks that do not own it, a weight is a placeholder
without memory (a tensor on the meta device), from which experts are cut, and dtypes cast, as from the weight itself.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.transports.transport import wait_until


class Gathering:
    """While it is `current`, `gathered` gives a weight to its owner, and a placeholder to the other ranks.

    Args:
        timeout_s: longest wait for the other ranks.
        waits: whether for what is gathered. Off after a failure: what is left is gathered in step with the other ranks,
            and nobody uses it.

    Attributes:
        owner: global rank that keeps what is gathered.
    """

    def __init__(self, timeout_s: float, *, waits: bool = True) -> None:
        self.owner = 0
        self.waits = waits
        self._timeout_s = timeout_s
        self._under_way: list[tuple[Any, tuple[Tensor, ...]]] = []

    @contextlib.contextmanager
    def to(self, owner: int) -> Iterator[None]:
        """Context in which `gathered` gives weights to `owner`."""
        self.owner = owner
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of `tensor` on its owner, a placeholder on other ranks. Sharded: every rank of its mesh comes here.

        Raises:
            SyncError: the owner is not in the mesh; the other ranks did not come in time.
        """
        from torch.distributed.tensor import Replicate, Shard

        if not hasattr(tensor, "full_tensor"):
            return tensor if self._owns else placeholder(tensor.shape, tensor.dtype)
        mesh, placements = tensor.device_mesh, tensor.placements  # pyrefly: ignore
        if self.owner not in mesh.mesh.flatten().tolist():
            raise SyncError(
                f"rank {self.owner} is to send a weight whose shards are on ranks {mesh.mesh.tolist()}: expected a "
                "mesh of all ranks that send, or senders='first' of a rank in it"
            )
        sharded = [at for at, placement in enumerate(placements) if type(placement) is not Replicate]
        if not sharded:
            return tensor.to_local() if self._owns else placeholder(tensor.shape, tensor.dtype)  # pyrefly: ignore
        local = on_mesh(tensor)
        if len(sharded) > 1 or type(placements[sharded[0]]) is not Shard:
            # Sharded twice (FSDP over tensor parallelism), or partial: all ranks make it, and one keeps it.
            full = local.full_tensor()  # pyrefly: ignore
            return full if self._owns else placeholder(tensor.shape, tensor.dtype)
        # Other dimensions of the mesh hold replicas (HSDP): those of the owner gather.
        group = mesh.get_group(sharded[0])
        if self.owner not in dist.get_process_group_ranks(group):
            return placeholder(tensor.shape, tensor.dtype)
        return self._from_shards(local.to_local(), tensor.shape, placements[sharded[0]].dim, group)  # pyrefly: ignore

    def settle(self) -> None:
        """Wait until this rank's shards have gone to their owners."""
        under_way, self._under_way = self._under_way, []
        for work, _ in under_way:
            self._wait(work)

    @property
    def _owns(self) -> bool:
        return self.owner == (dist.get_rank() if dist.is_initialized() else 0)

    def of_one(
        self, tensor: Tensor | None, source: int, shape: torch.Size, dtype: torch.dtype, group: Any, device: str
    ) -> Tensor:
        """What the global rank `source` has of this shape and dtype, on its owner; every rank of `group` comes here."""
        ranks = dist.get_process_group_ranks(group)
        if self.owner not in ranks:
            return placeholder(shape, dtype)
        sent = torch.empty(0, dtype=dtype, device=device) if tensor is None else tensor
        received = self._to_owner(sent, [shape.numel() if rank == source else 0 for rank in ranks], ranks, group)
        return placeholder(shape, dtype) if received is None else received.view(shape)

    def _from_shards(self, shard: Tensor, shape: torch.Size, dim: int, group: Any) -> Tensor:
        ranks = dist.get_process_group_ranks(group)
        rows = -(-shape[dim] // len(ranks))  # as torch.chunk parts them
        shapes = [
            torch.Size([*shape[:dim], max(0, min(rows, shape[dim] - rows * at)), *shape[dim + 1 :]])
            for at in range(len(ranks))
        ]
        sizes = [part.numel() for part in shapes]
        received = self._to_owner(shard, sizes, ranks, group)
        if received is None:
            return placeholder(shape, shard.dtype)
        if dim == 0:
            return received.view(shape)
        parts = [received[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
        return torch.cat([part.view(of) for part, of in zip(parts, shapes, strict=True)], dim)

    def _to_owner(self, tensor: Tensor, sizes: list[int], ranks: list[int], group: Any) -> Tensor | None:
        """Exchange in which only the owner receives, `sizes` numbers of each rank, which may have none."""
        sent = tensor.detach().contiguous().view(-1).view(torch.uint8)
        nbytes = [size * tensor.dtype.itemsize if self._owns else 0 for size in sizes]
        received = torch.empty(sum(nbytes), dtype=torch.uint8, device=sent.device)
        to_owner = [sent.numel() if rank == self.owner else 0 for rank in ranks]
        work = dist.all_to_all_single(received, sent, nbytes, to_owner, group=group, async_op=True)
        if not self._owns or not self.waits:
            self._under_way.append((work, (received, sent)))
            return None
        self._wait(work)
        return received.view(tensor.dtype)

    def _wait(self, work: Any) -> None:
        wait_until(work.is_completed, lambda: False, self._timeout_s, "gathering shards from the other ranks")
        work.wait()  # raises what went wrong; the current stream waits for it


_current: ContextVar[Gathering | None] = ContextVar("gathering", default=None)


def current() -> Gathering | None:
    """The gathering in force; None where all ranks get whole weights."""
    return _current.get()


def placeholder(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Stands on this rank for a weight that another one keeps."""
    return torch.empty(shape, dtype=dtype, device="meta")


def on_mesh(tensor: Tensor) -> Tensor:
    """A DTensor on its mesh's device: shards that FSDP keeps in main memory are gathered by that device's backend."""
    on = tensor.device_mesh.device_type  # pyrefly: ignore
    return tensor if tensor.device.type == on else tensor.to(on)
