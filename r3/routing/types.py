"""`RolloutRouting`: which experts each token of a batch of rollouts went to.

Shapes: B batch, S sequence, L decoder layers, K slots, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from r3.errors import RoutingError, summary
from r3.routing.checks import check_rows
from r3.routing.layout import Packing, pad, shard, unshard


def compact_dtype(num_experts: int) -> torch.dtype:
    """Smallest integer dtype for ids of `num_experts` experts: uint8 up to 256, int16 up to 32768, else int32."""
    if num_experts <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """What the routing of a model looks like.

    Attributes:
        layer_ids: decoder layers that have a router, ascending.
        num_layers: all decoder layers; those in neither `layer_ids` nor `table_layers` are dense.
        num_experts: E.
        top_k: K.
        table_layers: decoder layers that choose by token id (DeepSeek-V4): the engine may report them, nobody needs it.
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    table_layers: tuple[int, ...] = ()

    def without_rows(self, tokens: int) -> "RolloutRouting":
        """`[1, tokens, L, K]` in which no row is valid: of a rollout that was not captured and is to be routed live."""
        shape = (1, tokens, len(self.layer_ids), self.top_k)
        expert_ids = torch.zeros(shape, dtype=compact_dtype(self.num_experts))
        return trusted(expert_ids, torch.zeros(shape[:2], dtype=torch.bool), self.layer_ids, self.num_experts, None, 0)


class RolloutRouting:
    """Expert ids of a batch, checked when made: every valid row holds K distinct ids in [0, E). Immutable.

    It has memory of its own: what is written afterwards into the tensors that it was made of does not reach it. Its
    `expert_ids` and `valid` are that memory, to be read; `clone()` them to write. After torch has written into them, or
    into a view of them, it can no longer be used and says so. A write that torch does not count (by numpy, `.data`, in
    inference mode) is not seen.

    Not a dataclass: FSDP2 rebuilds those when it casts the inputs of a forward.

    Args:
        expert_ids: integer `[B, S, L, K]`; copied, in the compact dtype of `num_experts`.
        valid: bool `[B, S]`. A row that is not valid was not captured, or belongs to padding or to the token that
            was sampled last; its ids are ignored (and stored as 0) and the token is routed live.
        layer_ids: decoder layer of each of the L columns, ascending.
        num_experts: E.
        weight_version: version of the weights that produced the rows, where known.

    Raises:
        RoutingError: wrong shape or dtype, an id out of range or repeated in a valid row; also by whatever uses it once
            its tensors were written to.

    Example:
        >>> ids = torch.tensor([[[[0, 2]], [[1, 3]]]])
        >>> RolloutRouting(ids, torch.tensor([[True, True]]), layer_ids=(0,), num_experts=4).shape
        (1, 2, 1, 2)
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    weight_version: int | None
    _expert_ids: Tensor
    _valid: Tensor
    _writes: tuple[int | None, int | None]

    def __init__(
        self,
        expert_ids: Tensor,
        valid: Tensor,
        layer_ids: Sequence[int],
        num_experts: int,
        weight_version: int | None = None,
    ) -> None:
        integer = not (expert_ids.is_floating_point() or expert_ids.is_complex() or expert_ids.dtype == torch.bool)
        if expert_ids.dim() != 4 or not integer:
            raise RoutingError(
                f"expert_ids: expected integer [B, S, L, K], got {expert_ids.dtype} {tuple(expert_ids.shape)}"
            )
        if valid.dtype != torch.bool or valid.shape != expert_ids.shape[:2]:
            raise RoutingError(
                f"valid: expected bool [B, S] = {tuple(expert_ids.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
            )
        if len(layer_ids) != expert_ids.shape[2] or list(layer_ids) != sorted(set(layer_ids)):
            raise RoutingError(
                f"layer_ids: expected {expert_ids.shape[2]} ascending decoder layers, one a column, got {layer_ids}"
            )
        check_rows(expert_ids, valid, tuple(layer_ids), num_experts)
        compact = expert_ids.to(compact_dtype(num_experts), copy=True)
        valid = valid.clone()
        rows_valid = int(valid.sum())
        if rows_valid < valid.numel():
            compact.masked_fill_(~valid[..., None, None], 0)
        self._set(compact, valid, tuple(layer_ids), num_experts, weight_version, rows_valid)

    def _set(
        self,
        expert_ids: Tensor,
        valid: Tensor,
        layer_ids: tuple[int, ...],
        num_experts: int,
        weight_version: int | None,
        rows_valid: int | None,
    ) -> None:
        """What this memory holds is not written to from here on."""
        vars(self).update(
            _expert_ids=expert_ids,
            _valid=valid,
            _writes=(_writes(expert_ids), _writes(valid)),
            layer_ids=layer_ids,
            num_experts=num_experts,
            weight_version=weight_version,
        )
        if rows_valid is not None:
            vars(self)["rows_valid"] = rows_valid

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"RolloutRouting is immutable: {name} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.expert_ids, self.valid, self.layer_ids, self.num_experts, self.weight_version)
        return trusted, (*parts, vars(self).get("rows_valid"))

    def __repr__(self) -> str:
        return (
            f"RolloutRouting({tuple(self.shape)} of {self.num_experts} experts, {self.rows_valid} of "
            f"{self.valid.numel()} rows valid, {self.expert_ids.dtype} on {self.device}, version {self.weight_version})"
        )

    @property
    def expert_ids(self) -> Tensor:
        """`[B, S, L, K]` in the compact dtype, 0 in rows that are not valid: the routing's own memory."""
        self._require_unwritten()
        return self._expert_ids

    @property
    def valid(self) -> Tensor:
        """bool `[B, S]`: the routing's own memory."""
        self._require_unwritten()
        return self._valid

    def _require_unwritten(self) -> None:
        if self._writes != (_writes(self._expert_ids), _writes(self._valid)):
            raise RoutingError(
                "routing was written to after it was checked: its expert_ids and valid, and views of them, are only to "
                "be read. clone() them, write to the copies, and make a RolloutRouting of these"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, S, L, K)."""
        b, s, n, k = self._expert_ids.shape
        return b, s, n, k

    @property
    def device(self) -> torch.device:
        return self._expert_ids.device

    @cached_property
    def rows_valid(self) -> int:
        """Number of valid rows; counted when first asked for, since the host waits for a GPU's count."""
        return int(self.valid.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RolloutRouting":
        """The same routing on `device`, moved in the compact dtype."""
        rows_valid = self.rows_valid  # counted where it is: the host need not wait for the GPU to say it
        expert_ids = self.expert_ids.to(device, non_blocking=non_blocking)
        return self._with(expert_ids, self.valid.to(device, non_blocking=non_blocking), rows_valid)

    def pin_memory(self) -> "RolloutRouting":
        """The same routing in page-locked host memory, from which `to` a GPU runs beside computation."""
        return self._with(self.expert_ids.pin_memory(), self.valid.pin_memory(), self.rows_valid)

    def select(self, samples: Tensor | Sequence[int] | slice) -> "RolloutRouting":
        """The samples of the batch that `samples` picks, in that order; a slice shares memory.

        Raises:
            RoutingError: neither a slice nor one dimension of indices.
        """
        index = samples if isinstance(samples, slice) else torch.as_tensor(samples, device=self.device)
        if isinstance(index, Tensor) and index.dim() != 1:
            raise RoutingError(f"samples: expected a slice or indices [n] of samples, got {samples}")
        return self._with(self.expert_ids[index], self.valid[index])

    def layers(self, layer_ids: Sequence[int]) -> "RolloutRouting":
        """The columns of these decoder layers, ascending.

        Raises:
            RoutingError: a layer without a column, or not ascending.
        """
        missing = sorted(set(layer_ids) - set(self.layer_ids))
        if missing or list(layer_ids) != sorted(set(layer_ids)):
            raise RoutingError(f"layer_ids: expected ascending layers out of {self.layer_ids}, got {tuple(layer_ids)}")
        columns = torch.tensor([self.layer_ids.index(layer) for layer in layer_ids], device=self.device)
        return replace_trusted(
            self,
            self.expert_ids.index_select(2, columns),
            self.valid,
            layer_ids=tuple(layer_ids),
            weight_version=self.weight_version,
            rows_valid=vars(self).get("rows_valid"),
        )

    def pad(self, length: int, side: Literal["right", "left"] = "right") -> "RolloutRouting":
        """Padded to `length` positions on one side; the new ones are not valid.

        Raises:
            RoutingError: `length` is shorter than S.
        """
        left = side == "left"
        expert_ids, valid = pad(self.expert_ids, length, left=left), pad(self.valid, length, left=left)
        return self if expert_ids is self.expert_ids else self._with(expert_ids, valid, vars(self).get("rows_valid"))

    def pack(self, packing: Packing) -> "RolloutRouting":
        """`[B, S]` -> `[R, N]`: the sequences of a padded batch in packed rows; padding is not valid."""
        return self._with(packing.pack(self.expert_ids), packing.pack(self.valid))

    def unpack(self, packing: Packing) -> "RolloutRouting":
        """`[R, N]` -> `[B, S]`: the inverse of `pack`."""
        return self._with(packing.unpack(self.expert_ids), packing.unpack(self.valid))

    def shard(self, rank: int, size: int) -> "RolloutRouting":
        """The contiguous slice of the sequence that is `rank`'s of `size`, padded with rows that are not valid."""
        return self._with(shard(self.expert_ids, rank, size), shard(self.valid, rank, size))

    @classmethod
    def unshard(cls, slices: Sequence["RolloutRouting"], length: int) -> "RolloutRouting":
        """Routing of `length` positions whose slices these are, by rank: the inverse of `shard`.

        Raises:
            RoutingError: slices that differ in anything but their rows, or that are not those of `length`.
        """
        _require_one_kind(slices)
        expert_ids = unshard([part.expert_ids for part in slices], length)
        valid = unshard([part.valid for part in slices], length)
        return replace_trusted(slices[0], expert_ids, valid, weight_version=_version(slices))

    @classmethod
    def cat(
        cls, parts: Sequence["RolloutRouting"], *, length: int | None = None, pin_memory: bool = False
    ) -> "RolloutRouting":
        """One batch of all samples of `parts`, right-padded to `length`, by default to the longest.

        Each id is written once, into one buffer: page-locked if `pin_memory`.

        Raises:
            RoutingError: no parts, parts that differ in layers, slots, experts or device, or are longer than `length`.
        """
        _require_one_kind(parts)
        longest = max(part.shape[1] for part in parts)
        length = longest if length is None else length
        if length < longest:
            raise RoutingError(f"length: expected at least that of the longest part, {longest}, got {length}")
        if len(parts) == 1 and length == longest and not pin_memory:
            return parts[0]
        first = parts[0].expert_ids
        samples = sum(part.shape[0] for part in parts)
        where: dict[str, Any] = dict(device=first.device, pin_memory=pin_memory)
        expert_ids = torch.empty(samples, length, *first.shape[2:], dtype=first.dtype, **where)
        valid = torch.empty(samples, length, dtype=torch.bool, **where)
        at = 0
        for part in parts:
            b, s = part.shape[:2]
            expert_ids[at : at + b, :s] = part.expert_ids
            expert_ids[at : at + b, s:] = 0
            valid[at : at + b, :s] = part.valid
            valid[at : at + b, s:] = False
            at += b
        return replace_trusted(parts[0], expert_ids, valid, weight_version=_version(parts))

    def to_bytes(self, *, compress: bool = False) -> bytes:
        """The wire form, which `from_bytes` reads: described in docs/wire-format.md.

        Args:
            compress: Huffman codes of the ids' bytes, by zlib. Slow, and seldom much smaller: docs/performance.md.

        Raises:
            RoutingError: a decoder layer or weight version that the format cannot hold.
        """
        from r3.routing.wire import encode

        return encode(self, compress=compress)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, max_bytes: int = 1 << 32) -> "RolloutRouting":
        """The routing that `to_bytes` wrote, checked like any that comes from outside.

        Of `bytes`, or a view of them, ids that are not compressed are not copied: the routing keeps `data` alive. What
        can be written to is copied first.

        Args:
            data: one whole message.
            max_bytes: the most that ids and validity may take in memory; nothing larger is allocated.

        Raises:
            RoutingError: not a message, one of a newer format, truncated, damaged, larger than `max_bytes`, or with
                ids out of range or repeated in a valid row.
        """
        from r3.routing.wire import decode

        return decode(data, max_bytes=max_bytes)

    def _with(self, expert_ids: Tensor, valid: Tensor, rows_valid: int | None = None) -> "RolloutRouting":
        return replace_trusted(self, expert_ids, valid, weight_version=self.weight_version, rows_valid=rows_valid)


def _writes(tensor: Tensor) -> int | None:
    """How often torch has written to the memory, by any view of it; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _require_one_kind(parts: Sequence[RolloutRouting]) -> None:
    if not parts:
        raise RoutingError("parts: expected at least one, got none")
    kinds = {(part.layer_ids, part.shape[3], part.num_experts, str(part.device)) for part in parts}
    if len(kinds) != 1:
        raise RoutingError(
            f"parts: expected one (layer_ids, K, num_experts, device), got{summary(map(str, sorted(kinds)))}"
        )


def _version(parts: Sequence[RolloutRouting]) -> int | None:
    """The one of all parts, or None."""
    versions = {part.weight_version for part in parts}
    return versions.pop() if len(versions) == 1 else None


def replace_trusted(
    like: RolloutRouting,
    expert_ids: Tensor,
    valid: Tensor,
    *,
    layer_ids: tuple[int, ...] | None = None,
    weight_version: int | None,
    rows_valid: int | None = None,
) -> RolloutRouting:
    """A `RolloutRouting` of rows that another one has checked already: content is not looked at again."""
    return trusted(expert_ids, valid, layer_ids or like.layer_ids, like.num_experts, weight_version, rows_valid)


def trusted(
    expert_ids: Tensor,
    valid: Tensor,
    layer_ids: tuple[int, ...],
    num_experts: int,
    weight_version: int | None,
    rows_valid: int | None = None,
) -> RolloutRouting:
    """A `RolloutRouting` of what the caller has checked and nobody else can write to: nothing is looked at or copied.

    The ids are in the compact dtype, distinct and in range in valid rows, and 0 in the others.
    """
    new = object.__new__(RolloutRouting)
    new._set(expert_ids, valid, layer_ids, num_experts, weight_version, rows_valid)
    return new
