"""`RolloutRouting`: which experts each token of a batch of rollouts went to.

Shapes: B batch, S sequence, L decoder layers, K slots, E experts.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from r3.errors import RoutingError, summary
from r3.routing.checks import check_rows
from r3.routing.layout import Packing, pad, shard, unshard
from r3.routing.spec import Parts, RoutingSpec, compact_dtype
from r3.routing.validity import Counts, by_pair, by_row, counted, in_one_form
from r3.routing.wire import decode, encode


class RolloutRouting:
    """Expert ids of a batch, checked when made: every valid row holds K distinct ids in [0, E). Immutable.

    It owns its memory: later writes to the tensors it was made of do not affect it. The tensors that it returns share
    that memory and are read-only; `clone()` them to write. After torch has written to them, or to a view of them, any
    use raises. Writes that torch does not count (by numpy, `.data`, in inference mode) are not detected.

    Not a dataclass: FSDP2 rebuilds those when it casts the inputs of a forward.

    Args:
        expert_ids: integer `[B, S, L, K]`; copied, in the compact dtype of `num_experts`.
        valid: bool `[B, S]`. A row that is not valid was not captured, or belongs to padding or to the token that
            was sampled last; its ids are ignored (and stored as 0) and the token is routed live. Or `[B, S, L]`, where
            rows are valid in some layers only: a token is then routed live in the others.
        layer_ids: decoder layer of each of the L columns, ascending.
        num_experts: E.
        weight_version: version of the weights that produced the rows, where known.

    Raises:
        RoutingError: wrong shape or dtype, an id out of range or repeated in a valid row; also on any use after its
            tensors were written to.

    Example:
        >>> ids = torch.tensor([[[[0, 2]], [[1, 3]]]])
        >>> RolloutRouting(ids, torch.tensor([[True, True]]), layer_ids=(0,), num_experts=4).shape
        (1, 2, 1, 2)
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    weight_version: int | None
    _expert_ids: Tensor
    _validity: Tensor
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
        if valid.dtype != torch.bool or valid.shape not in (expert_ids.shape[:2], expert_ids.shape[:3]):
            raise RoutingError(
                f"valid: expected bool [B, S] = {tuple(expert_ids.shape[:2])} or [B, S, L], got {valid.dtype} "
                f"{tuple(valid.shape)}"
            )
        if len(layer_ids) != expert_ids.shape[2] or list(layer_ids) != sorted(set(layer_ids)):
            raise RoutingError(
                f"layer_ids: expected {expert_ids.shape[2]} ascending decoder layers, one a column, got {layer_ids}"
            )
        check_rows(expert_ids, valid, tuple(layer_ids), num_experts)
        compact = expert_ids.to(compact_dtype(num_experts), copy=True)
        validity = by_row(valid.clone())
        counts = counted(validity, len(layer_ids))
        if counts.pairs < expert_ids.shape[:3].numel():
            compact.masked_fill_(~by_pair(validity)[..., None], 0)
        self._set(compact, validity, tuple(layer_ids), num_experts, weight_version, counts)

    def _set(
        self,
        expert_ids: Tensor,
        validity: Tensor,
        layer_ids: tuple[int, ...],
        num_experts: int,
        weight_version: int | None,
        counts: Counts | None,
    ) -> None:
        """Set all attributes. The tensors must not be written to afterwards."""
        vars(self).update(
            _expert_ids=expert_ids,
            _validity=validity,
            _writes=(_writes(expert_ids), _writes(validity)),
            layer_ids=layer_ids,
            num_experts=num_experts,
            weight_version=weight_version,
        )
        if counts is not None:
            vars(self)["_counts"] = counts

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"RolloutRouting is immutable: {name} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return trusted, (*self._parts(), vars(self).get("_counts"))

    def _parts(self) -> Parts:
        return Parts(self.expert_ids, self.validity, self.layer_ids, self.num_experts, self.weight_version)

    def __repr__(self) -> str:
        return (
            f"RolloutRouting({tuple(self.shape)} of {self.num_experts} experts, {self.rows_valid} of "
            f"{self.shape[0] * self.shape[1]} rows valid{self._partial()}, {self.expert_ids.dtype} on {self.device}, "
            f"version {self.weight_version})"
        )

    def _partial(self) -> str:
        pairs = self.pairs_valid - self.rows_valid * self.shape[2]
        return f" and {pairs} (token, layer) pairs of others" if pairs else ""

    @property
    def expert_ids(self) -> Tensor:
        """`[B, S, L, K]` in the compact dtype, 0 where they are not valid."""
        self._require_unwritten()
        return self._expert_ids

    @property
    def validity(self) -> Tensor:
        """Valid rows: bool `[B, S]`, or `[B, S, L]` if rows may be valid in some layers only."""
        self._require_unwritten()
        return self._validity

    @property
    def valid(self) -> Tensor:
        """bool `[B, S]`: rows that are valid in every layer."""
        return self.validity if self.validity.dim() == 2 else self.validity.all(-1)

    @property
    def captured(self) -> Tensor:
        """bool `[B, S]`: rows that are valid in one layer or more."""
        return self.validity if self.validity.dim() == 2 else self.validity.any(-1)

    def _require_unwritten(self) -> None:
        if self._writes != (_writes(self._expert_ids), _writes(self._validity)):
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
    def _counts(self) -> Counts:
        """Counted on first use, since the host waits for a GPU's count."""
        return counted(self.validity, self.shape[2])

    @property
    def rows_valid(self) -> int:
        """Number of rows that are valid in every layer."""
        return self._counts.rows

    @property
    def pairs_valid(self) -> int:
        """Number of (token, layer) pairs that are valid: L for each valid row, fewer for one that some layers lack."""
        return self._counts.pairs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RolloutRouting":
        """The same routing on `device`, moved in the compact dtype."""
        counts = self._counts  # counted before the move, so that the host need not wait for the GPU
        expert_ids = self.expert_ids.to(device, non_blocking=non_blocking)
        return self._with(expert_ids, self.validity.to(device, non_blocking=non_blocking), counts)

    def pin_memory(self) -> "RolloutRouting":
        """The same routing in page-locked host memory, from which `to` a GPU runs beside computation."""
        return self._with(self.expert_ids.pin_memory(), self.validity.pin_memory(), self._counts)

    def select(self, samples: Tensor | Sequence[int] | slice) -> "RolloutRouting":
        """The samples of the batch that `samples` picks, in that order; a slice shares memory.

        Raises:
            RoutingError: neither a slice nor one dimension of indices.
        """
        index = samples if isinstance(samples, slice) else torch.as_tensor(samples, device=self.device)
        if isinstance(index, Tensor) and index.dim() != 1:
            raise RoutingError(f"samples: expected a slice or indices [n] of samples, got {samples}")
        return self._with(self.expert_ids[index], self.validity[index])

    def only(self, rows: Tensor) -> "RolloutRouting":
        """The same routing, with only the rows in bool `rows` `[B, S]` valid."""
        validity = self.validity & (rows if self.validity.dim() == 2 else rows[..., None])
        return self._with(self.expert_ids.masked_fill(~rows[..., None, None], 0), validity)

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
            self.validity if self.validity.dim() == 2 else self.validity.index_select(2, columns),
            layer_ids=tuple(layer_ids),
            weight_version=self.weight_version,
            counts=self._counts_of(len(layer_ids)),
        )

    def _counts_of(self, layers: int) -> Counts | None:
        """The counts with other columns, if they are known."""
        counts = vars(self).get("_counts")
        return Counts(counts.rows, counts.rows * layers) if counts and self._validity.dim() == 2 else None

    def pad(self, length: int, side: Literal["right", "left"] = "right") -> "RolloutRouting":
        """Padded to `length` positions on one side; the new ones are not valid.

        Raises:
            RoutingError: `length` is shorter than S.
        """
        left = side == "left"
        expert_ids, validity = pad(self.expert_ids, length, left=left), pad(self.validity, length, left=left)
        return self if expert_ids is self.expert_ids else self._with(expert_ids, validity, vars(self).get("_counts"))

    def pack(self, packing: Packing) -> "RolloutRouting":
        """`[B, S]` -> `[R, N]`: the sequences of a padded batch in packed rows; padding is not valid."""
        return self._with(packing.pack(self.expert_ids), packing.pack(self.validity))

    def unpack(self, packing: Packing) -> "RolloutRouting":
        """`[R, N]` -> `[B, S]`: the inverse of `pack`."""
        return self._with(packing.unpack(self.expert_ids), packing.unpack(self.validity))

    def shard(self, rank: int, size: int) -> "RolloutRouting":
        """The contiguous slice of the sequence that is `rank`'s of `size`, padded with rows that are not valid."""
        return self._with(shard(self.expert_ids, rank, size), shard(self.validity, rank, size))

    @classmethod
    def without_rows(cls, spec: RoutingSpec, tokens: int) -> "RolloutRouting":
        """`[1, tokens, L, K]` in which no row is valid: for a rollout that was not captured and is routed live."""
        shape = (1, tokens, len(spec.layer_ids), spec.top_k)
        expert_ids = torch.zeros(shape, dtype=compact_dtype(spec.num_experts))
        validity = torch.zeros(1, tokens, dtype=torch.bool)
        return trusted(expert_ids, validity, spec.layer_ids, spec.num_experts, None, Counts(0, 0))

    @classmethod
    def unshard(cls, slices: Sequence["RolloutRouting"], length: int) -> "RolloutRouting":
        """Routing of `length` positions whose slices these are, by rank: the inverse of `shard`.

        Raises:
            RoutingError: slices that differ in anything but their rows, or that are not those of `length`.
        """
        _require_one_kind(slices)
        expert_ids = unshard([part.expert_ids for part in slices], length)
        validity = unshard(in_one_form([part.validity for part in slices]), length)
        return replace_trusted(slices[0], expert_ids, validity, weight_version=_version(slices))

    @classmethod
    def cat(
        cls,
        parts: Sequence["RolloutRouting"],
        *,
        length: int | None = None,
        starts: Sequence[int] | None = None,
        pin_memory: bool = False,
    ) -> "RolloutRouting":
        """One batch of all samples of `parts`, right-padded to `length`, by default to the end of the longest.

        Each id is copied once, into one buffer, page-locked if `pin_memory`.

        Args:
            parts: of one kind.
            length: positions of the batch.
            starts: position of each part's first one, by default 0: the padding on the left of a prompt.
            pin_memory: whether its memory is page-locked.

        Raises:
            RoutingError: no parts, or parts that differ in layers, slots, experts or device, that end after `length`,
                or have no start from 0 up each.
        """
        _require_one_kind(parts)
        starts = [0] * len(parts) if starts is None else starts
        if len(starts) != len(parts) or min(starts) < 0:
            raise RoutingError(f"starts: expected {len(parts)} positions from 0 up, one a part, got {list(starts)}")
        longest = max(start + part.shape[1] for start, part in zip(starts, parts, strict=True))
        length = longest if length is None else length
        if length < longest:
            raise RoutingError(f"length: expected at least {longest}, where the longest part ends, got {length}")
        if len(parts) == 1 and length == parts[0].shape[1] and not pin_memory:
            return parts[0]
        first = parts[0].expert_ids
        samples = sum(part.shape[0] for part in parts)
        where: dict[str, Any] = dict(device=first.device, pin_memory=pin_memory)
        expert_ids = torch.empty(samples, length, *first.shape[2:], dtype=first.dtype, **where)
        validities = in_one_form([part.validity for part in parts])
        validity = torch.empty(samples, length, *validities[0].shape[2:], dtype=torch.bool, **where)
        at = 0
        for part, valid, start in zip(parts, validities, starts, strict=True):
            b, end = part.shape[0], start + part.shape[1]
            for target, rows in ((expert_ids, part.expert_ids), (validity, valid)):
                target[at : at + b, start:end] = rows
                target[at : at + b, :start] = 0
                target[at : at + b, end:] = 0
            at += b
        return replace_trusted(parts[0], expert_ids, validity, weight_version=_version(parts))

    def to_bytes(self, *, compress: bool = False) -> bytes:
        """The wire form, which `from_bytes` reads: described in docs/reference/wire-format.md.

        Args:
            compress: Huffman-code the ids' bytes by zlib. Slow, and seldom much smaller: docs/lab/performance.md.

        Raises:
            RoutingError: a decoder layer or weight version that the format cannot hold.
        """
        return encode(self._parts(), compress=compress)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, max_bytes: int = 1 << 32) -> "RolloutRouting":
        """The routing that `to_bytes` wrote, checked like any outside input.

        Uncompressed ids in `bytes`, or a view of them, are not copied: the routing keeps `data` alive. Writable buffers
        are copied first.

        Args:
            data: one whole message.
            max_bytes: the most that ids and validity may take in memory; nothing larger is allocated.

        Raises:
            RoutingError: not a message, one of a newer format, truncated, damaged, larger than `max_bytes`, or with
                ids out of range or repeated in a valid row.
        """
        return trusted(*decode(data, max_bytes=max_bytes))

    def _with(self, expert_ids: Tensor, validity: Tensor, counts: Counts | None = None) -> "RolloutRouting":
        return replace_trusted(self, expert_ids, validity, weight_version=self.weight_version, counts=counts)


def _writes(tensor: Tensor) -> int | None:
    """Number of torch's writes to the memory, through any view; None if torch does not count them."""
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
    """The version that all parts share, or None."""
    versions = {part.weight_version for part in parts}
    return versions.pop() if len(versions) == 1 else None


def replace_trusted(
    like: RolloutRouting,
    expert_ids: Tensor,
    validity: Tensor,
    *,
    layer_ids: tuple[int, ...] | None = None,
    weight_version: int | None,
    counts: Counts | None = None,
) -> RolloutRouting:
    """A `RolloutRouting` of rows that another one has already checked: the content is not checked again."""
    return trusted(expert_ids, validity, layer_ids or like.layer_ids, like.num_experts, weight_version, counts)


def trusted(
    expert_ids: Tensor,
    validity: Tensor,
    layer_ids: tuple[int, ...],
    num_experts: int,
    weight_version: int | None,
    counts: Counts | None = None,
) -> RolloutRouting:
    """A `RolloutRouting` of tensors that the caller has checked and nobody else can write to: not checked, not copied.

    The ids are in the compact dtype, distinct and in range where they are valid, and 0 where not.
    """
    new = object.__new__(RolloutRouting)
    new._set(expert_ids, validity, layer_ids, num_experts, weight_version, counts)
    return new
