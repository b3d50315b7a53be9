"""How ranks share a sharded weight along its first dimension, as FSDP2 and expert parallelism share experts."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from r3.errors import SyncError
from r3.weight_sync.weights.gathering import current, on_mesh, placeholder


@dataclass(frozen=True)
class RowBlock:
    """Entries of a weight along its first dimension that a rank holds, and no others.

    Attributes:
        first, last: the entries from `first` up to `last`.
        holders: global ranks that hold them, in order.
    """

    first: int
    last: int
    holders: tuple[int, ...]


def row_blocks(tensor: Any) -> tuple[RowBlock, ...]:
    """The blocks of a DTensor that is sharded along its first dimension alone, in order; else, or if whole, none.

    Raises:
        SyncError: torch shards it in an order that is not known here.
    """
    placements = getattr(tensor, "placements", ())
    return _blocks(len(tensor), tensor.device_mesh, tuple(placements)) if placements else ()


@lru_cache(maxsize=256)  # many weights have few layouts, and a look at torch's own waits for the device
def _blocks(entries: int, mesh: DeviceMesh, placements: tuple[Any, ...]) -> tuple[RowBlock, ...]:
    on_rows = [at for at, placed in enumerate(placements) if type(placed) is not Replicate]
    if not on_rows or any(getattr(placements[at], "dim", None) != 0 for at in on_rows):
        return ()
    # `_StridedShard`: FSDP2 shards, from the left of the mesh, what those to its right have sharded before.
    strided = [at for at in on_rows if hasattr(placements[at], "split_factor")]
    order = [*(at for at in on_rows if at not in strided), *reversed(strided)]
    ranks = mesh.mesh.numpy()
    held: dict[tuple[int, int], list[int]] = {}
    for coordinate, rank in np.ndenumerate(ranks):
        first, last = 0, entries
        for at in order:
            rows = -(-(last - first) // ranks.shape[at])  # as torch.chunk parts them
            first = min(first + rows * coordinate[at], last)
            last = min(first + rows, last)
        if first < last:
            held.setdefault((first, last), []).append(int(rank))
    blocks = tuple(RowBlock(first, last, tuple(sorted(ranks))) for (first, last), ranks in sorted(held.items()))
    _require_as_torch(entries, mesh, placements, blocks)
    return blocks


def gathered_block(tensor: Any, block: RowBlock) -> Tensor:
    """The entries of `block`, one of the `row_blocks` of `tensor`, detached, and no others gathered.

    Every rank of its mesh must come here. Where one that holds the block sends it, nothing is exchanged.
    """
    local, rank, gathering = tensor.detach().to_local(), dist.get_rank(), current()
    shape = torch.Size([block.last - block.first, *tensor.shape[1:]])
    if gathering is not None and gathering.owner in block.holders:
        return local if rank == gathering.owner else placeholder(shape, tensor.dtype)
    mesh, placements = tensor.device_mesh, tensor.placements
    on_rows = [at for at, placed in enumerate(placements) if type(placed) is not Replicate]
    if len(on_rows) == 1:
        group = mesh.get_group(on_rows[0])
        (source,) = set(dist.get_process_group_ranks(group)) & set(block.holders)
        # FSDP2 may keep shards in main memory.
        found = local.contiguous().to(mesh.device_type) if rank == source else None
        if gathering is not None:
            return gathering.of_one(found, source, shape, tensor.dtype, group, mesh.device_type)
        if found is None:
            found = torch.empty(shape, dtype=tensor.dtype, device=mesh.device_type)
        dist.broadcast(found, source, group=group)
        return found
    # Each entry is on one rank of a dimension that shards entries, and zero on the others.
    part = local if rank in block.holders else local.new_zeros(shape)
    summed = [Partial() if at in on_rows else placed for at, placed in enumerate(placements)]
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(part, mesh, summed, run_check=False, shape=shape, stride=stride)
    return gathering.whole(whole) if gathering is not None else on_mesh(whole).full_tensor()  # pyrefly: ignore


def _require_as_torch(
    entries: int, mesh: DeviceMesh, placements: tuple[Any, ...], blocks: tuple[RowBlock, ...]
) -> None:
    """What torch itself gives this rank of a weight that numbers its entries."""
    rank = dist.get_rank()
    numbers = torch.arange(entries, device=mesh.device_type)
    held = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local().tolist()
    expected = [list(range(block.first, block.last)) for block in blocks if rank in block.holders] or [[]]
    if [held] != expected:
        raise SyncError(
            f"a weight of {entries} entries, sharded {placements} over {mesh}: expected rank {rank} to hold "
            f"the entries {expected[0]}, got {held}"
        )
