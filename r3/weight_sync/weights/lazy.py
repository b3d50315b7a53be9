"""Lazily materialised weights: metadata now, the tensor on demand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.weights.gathering import current, on_mesh
from r3.weight_sync.weights.row_blocks import RowBlock


@dataclass(frozen=True, kw_only=True, eq=False)
class LazyWeight:
    """A weight that is materialised only when it is sent: gathered, merged, cut out of a larger one, or quantised.

    Attributes:
        name: for messages.
        shape, dtype: of what `make` returns.
        make: returns the tensor, which may be a view of the live weight: read it, do not write to it. Where the
            weight is sharded, every rank of its mesh must call it, in the same order.
        keep_dtype: whether a sync keeps the dtype, even if it casts the other weights to the engine's.
        live: whether `make` gives the weight itself or a contiguous view of it, and makes nothing.
        parts: names of the checkpoint's tensors, of one shape, that this weight holds fused, in order.
        together: what it is made of or by, where other weights are too: one rank takes all that have one in common.
        blocks: that ranks share the weight in, if any; `make_block` makes one of them, as `make` makes all.
        holders: global ranks that make the weight without the others; none if it takes all of them.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    keep_dtype: bool = False
    live: bool = False
    parts: tuple[str, ...] = ()
    together: tuple[Any, ...] = ()
    blocks: tuple[RowBlock, ...] = ()
    make_block: Callable[[RowBlock], Tensor] | None = None
    holders: tuple[int, ...] = ()


Weight = Tensor | LazyWeight


def is_live(weight: Weight) -> bool:
    """Whether `gathered(weight)` returns the live weight itself, contiguous and without a copy."""
    if isinstance(weight, LazyWeight):
        return weight.live
    return not is_sharded(weight) and weight.is_contiguous()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def gathered(weight: Weight) -> Tensor:
    """The whole of `weight`, detached. A sharded one (DTensor) is gathered: every rank of its mesh must come here.

    In a sync from all ranks only the rank that sends it gets it; the others get a placeholder on the meta device.

    Raises:
        SyncError: a `LazyWeight` whose weight has changed its shape or dtype since it was listed.
    """
    if isinstance(weight, LazyWeight):
        tensor = weight.make()
        if (tensor.shape, tensor.dtype) != (weight.shape, weight.dtype):
            is_now = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise SyncError(
                f"{weight.name}: expected {tuple(weight.shape)} {weight.dtype} as listed, got {is_now}: the model "
                "has changed since its weights were listed; list them again"
            )
        return tensor
    tensor = weight.detach()
    if (gathering := current()) is not None:
        return gathering.whole(tensor)
    return on_mesh(tensor).full_tensor() if is_sharded(tensor) else tensor  # pyrefly: ignore


def as_source(name: str, weight: Weight) -> LazyWeight:
    """`weight` as a `LazyWeight`."""
    if isinstance(weight, LazyWeight):
        return weight
    return LazyWeight(
        name=name, shape=weight.shape, dtype=weight.dtype, make=lambda: gathered(weight), live=is_live(weight)
    )


class SharedMaterialization:
    """Tensors that are materialised by one call and taken one by one. Each is released when it is taken.

    They are materialised again when the tensor that was taken first is taken again, so that a pass that stopped half
    way leaves nothing stale for the next: every pass takes them in the same order, from the start.
    """

    def __init__(self, make: Callable[[], list[Tensor]]) -> None:
        self._make = make
        self._first: int | None = None
        self._ready: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        if self._first is None:
            self._first = index
        if index == self._first:
            self._ready.clear()
            self._ready = dict(enumerate(self._make()))
        elif index not in self._ready:
            return self._make()[index]
        return self._ready.pop(index)
