"""Packs tensors into a few blocks of bytes: small ones into one shared buffer, large ones without a copy."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Chunk

_ALIGNMENT = 256
_LARGE_BYTES = 4 << 20  # copying a smaller tensor costs less than a message of its own

BlockLayout = list[list]
"""[name, dtype, shape, offset in bytes] of each tensor in a block. Plain, so that it travels with a call."""


@dataclass(frozen=True, kw_only=True)
class PackedBlock:
    """Attributes:
    data: uint8, one-dimensional, contiguous.
    layout: name, dtype, shape and offset of each tensor in it.
    """

    data: Tensor
    layout: BlockLayout


def pack(chunk: Chunk, device: torch.device) -> list[PackedBlock]:
    """Pack `chunk` in order into blocks on `device`: as few as possible without copying large tensors."""
    blocks = []
    for alone, group in itertools.groupby(chunk, lambda item: _needs_no_copy(item[1], device)):
        if alone:
            blocks += [_block_of_one(name, tensor) for name, tensor in group]
        else:
            blocks.append(_packed(list(group), device))
    return blocks


def unpack(data: Tensor, layout: BlockLayout) -> Iterator[tuple[str, Tensor]]:
    """Views of the tensors in a block.

    Raises:
        SyncError: a tensor reaches beyond the block.
    """
    for name, dtype_name, shape, offset in layout:
        dtype = dtype_of(dtype_name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if offset < 0 or offset + nbytes > data.numel():
            raise SyncError(f"{name}: bytes {offset} to {offset + nbytes} of a block of {data.numel()}")
        yield name, data[offset : offset + nbytes].view(dtype).view(shape)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as "torch.bfloat16"."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"expected the name of a dtype, got {name!r}")
    return dtype


def _needs_no_copy(tensor: Tensor, device: torch.device) -> bool:
    return tensor.nbytes >= _LARGE_BYTES and tensor.is_contiguous() and tensor.device == device


def _block_of_one(name: str, tensor: Tensor) -> PackedBlock:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    return PackedBlock(data=data, layout=[[name, str(tensor.dtype), list(tensor.shape), 0]])


def _packed(group: Chunk, device: torch.device) -> PackedBlock:
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for _, tensor in group]
    offsets = [0, *itertools.accumulate(sizes)]
    data = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
    layout = []
    for (name, tensor), offset in zip(group, offsets, strict=False):
        layout.append([name, str(tensor.dtype), list(tensor.shape), offset])
        place = data[offset : offset + tensor.nbytes]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
    return PackedBlock(data=data, layout=layout)
