"""Where tokens lie: padded batches `[B, S]`, packed rows `[R, N]`, and one rank's contiguous slice of either.

A `Packing` places token ids, masks and routing alike, so that what belongs to one token stays together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from r3.errors import SHOWN, RoutingError, summary


@dataclass(frozen=True)
class Place:
    """One sequence: `length` tokens from `[sample, start]` of the batch, at `[row, offset]` of the packed rows."""

    sample: int
    start: int
    length: int
    row: int
    offset: int


@dataclass(frozen=True)
class Packing:
    """Places of all sequences of a padded batch in packed rows.

    Attributes:
        places: one a sample, in the order of the batch.
        batch_shape: (B, S).
        shape: (R, N), of the packed rows.

    Example:
        >>> packing = Packing.from_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> packing.pack(torch.tensor([[5, 6, 0], [7, 8, 9]]))
        tensor([[5, 6, 7, 8, 9]])
        >>> packing.position_ids()
        tensor([[0, 1, 0, 1, 2]])
    """

    places: tuple[Place, ...]
    batch_shape: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, *, row_length: int | None = None, multiple_of: int = 1) -> "Packing":
        """Packing of the tokens that `mask` shows.

        Args:
            mask: bool or integer `[B, S]`, true on tokens: one run a sample, padded on the right, the left or both.
            row_length: longest row; sequences go to the first row that has room. None puts all into one row.
            multiple_of: the rows' length N is rounded up to a multiple of it.

        Raises:
            RoutingError: tokens of a sample that are no single run, or that are more than `row_length`.
        """
        if mask.dim() != 2:
            raise RoutingError(f"mask: expected [B, S], got {tuple(mask.shape)}")
        tokens = mask.bool()
        lengths = tokens.sum(1)
        # The first token of each sample, and whether the run from there is all of them: one trip to the host.
        first = tokens.to(torch.uint8).argmax(1) if mask.shape[1] else lengths
        ends = (tokens & ~torch.nn.functional.pad(tokens, (0, 1))[:, 1:]).sum(1)
        starts, counts, runs = torch.stack([first, lengths, ends]).tolist()
        torn = [f"sample {b}: {runs[b]} runs of tokens" for b in range(len(runs)) if runs[b] > 1]
        if torn:
            raise RoutingError(
                f"mask: expected the tokens of each sample in one run, with padding before or after, got{summary(torn)}"
            )
        too_long = [
            f"sample {b}: {n} tokens" for b, n in enumerate(counts) if row_length is not None and n > row_length
        ]
        if too_long:
            raise RoutingError(
                f"row_length: expected at least the longest sample, got {row_length};{summary(too_long)}"
            )
        filled = [0]
        places = []
        for sample, (start, length) in enumerate(zip(starts, counts, strict=True)):
            row = next((r for r, used in enumerate(filled) if row_length is None or used + length <= row_length), -1)
            if row == -1:
                row = len(filled)
                filled.append(0)
            places.append(Place(sample, start, length, row, filled[row]))
            filled[row] += length
        longest = max(filled)
        width = max(-(-longest // multiple_of), 1) * multiple_of
        b, s = mask.shape
        return cls(tuple(places), (b, s), (len(filled), width))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, length: int) -> "Packing":
        """Packing of one row of `length` positions whose sequences are bounded by `cu_seqlens`.

        The batch that it unpacks to is right-padded. Positions after the last bound are padding.

        Raises:
            RoutingError: bounds that do not begin at 0, do not rise, or end beyond `length`.
        """
        bounds = [int(bound) for bound in cu_seqlens]
        lengths = [b - a for a, b in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or min(lengths) < 0 or bounds[-1] > length:
            raise RoutingError(
                f"cu_seqlens: expected bounds that rise from 0 to at most the {length} positions of the row, got "
                f"{bounds[:SHOWN]}{' ...' if len(bounds) > SHOWN else ''} ending at {bounds[-1] if bounds else None}"
            )
        places = tuple(Place(b, 0, n, 0, at) for b, (n, at) in enumerate(zip(lengths, bounds, strict=False)))
        return cls(places, (len(lengths), max(lengths)), (1, length))

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(place.length for place in self.places)

    def pack(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """`[B, S, ...]` -> `[R, N, ...]`, with `fill` on padding; shares memory where nothing has to move.

        Raises:
            RoutingError: not of the batch's shape.
        """
        self._require(tensor, self.batch_shape)
        source = [(p.sample, p.start, p.length) for p in self.places]
        return _moved(tensor, self.shape, source, [(p.row, p.offset, p.length) for p in self.places], fill)

    def unpack(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """`[R, N, ...]` -> `[B, S, ...]`, the inverse of `pack`.

        Raises:
            RoutingError: not of the packed rows' shape.
        """
        self._require(tensor, self.shape)
        source = [(p.row, p.offset, p.length) for p in self.places]
        return _moved(tensor, self.batch_shape, source, [(p.sample, p.start, p.length) for p in self.places], fill)

    def position_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 `[R, N]`, from 0 in each sequence; 0 on padding: each such position is a sequence of its own."""
        ids = torch.zeros(self.shape, dtype=torch.int64)
        count = torch.arange(max((p.length for p in self.places), default=0))
        for place in self.places:
            ids[place.row, place.offset : place.offset + place.length] = count[: place.length]
        return ids.to(device)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[sequences + 1]`: bounds of the sequences in the flattened rows; the padding of a row is one more."""
        bounds = {0, self.shape[0] * self.shape[1]}
        for p in self.places:
            begin = p.row * self.shape[1] + p.offset
            bounds |= {begin, begin + p.length}
        return torch.tensor(sorted(bounds), dtype=torch.int32, device=device)

    def _require(self, tensor: Tensor, shape: tuple[int, int]) -> None:
        if tuple(tensor.shape[:2]) != shape:
            raise RoutingError(
                f"expected a tensor that begins with {shape} (batch {self.batch_shape}, packed {self.shape}), got "
                f"{tuple(tensor.shape)}"
            )


def shard(tensor: Tensor, rank: int, size: int, *, fill: float | bool = 0, dim: int = 1) -> Tensor:
    """The contiguous slice of `rank` out of `size` along `dim`, which is padded with `fill` to a multiple of `size`.

    Shares memory except where padding is needed.

    Raises:
        RoutingError: no such rank.
    """
    if not 0 <= rank < size:
        raise RoutingError(f"rank: expected 0 to {size - 1}, got {rank}")
    length = tensor.shape[dim]
    width = -(-length // size)
    begin = min(rank * width, length)
    part = tensor.narrow(dim, begin, min(width, length - begin))
    missing = width - part.shape[dim]
    if not missing:
        return part
    padding = [*part.shape]
    padding[dim] = missing
    return torch.cat([part, part.new_full(padding, fill)], dim)


def unshard(slices: Sequence[Tensor], length: int, *, dim: int = 1) -> Tensor:
    """The tensor of `length` along `dim` whose slices these are, by rank: the inverse of `shard`.

    Raises:
        RoutingError: slices that differ in shape, or that are not those of `length`.
    """
    shapes = {tuple(part.shape) for part in slices}
    width = -(-length // len(slices)) if slices else 0
    if len(shapes) != 1 or slices[0].shape[dim] != width:
        raise RoutingError(
            f"slices: expected {len(slices)} of one shape with {width} positions, for a length of {length}, got "
            f"{sorted(shapes)}"
        )
    whole = slices[0] if len(slices) == 1 else torch.cat(list(slices), dim)
    return whole.narrow(dim, 0, length)


def _moved(
    tensor: Tensor,
    shape: tuple[int, int],
    source: list[tuple[int, int, int]],
    target: list[tuple[int, int, int]],
    fill: float | bool,
) -> Tensor:
    """`tensor` `[X, Y, ...]` with its runs (row, begin, length) at other places of `shape`, `fill` elsewhere."""
    used = sum(length for _, _, length in target)
    same_order = _flat(source, tensor.shape[1]) == _flat(target, shape[1])
    if used == tensor.shape[0] * tensor.shape[1] == shape[0] * shape[1] and same_order:
        return tensor.reshape(*shape, *tensor.shape[2:])
    if len(target) == 1 and shape[0] == 1 and target[0] == (0, 0, shape[1]):
        row, begin, length = source[0]
        return tensor[row : row + 1, begin : begin + length]
    if tensor.requires_grad:  # one write into a fresh buffer, that autograd can follow
        moved = torch.full((*shape, *tensor.shape[2:]), fill, dtype=tensor.dtype, device=tensor.device)
        where = _positions(target, shape[1]).to(tensor.device)
        values = tensor.flatten(0, 1)[_positions(source, tensor.shape[1]).to(tensor.device)]
        return moved.flatten(0, 1).index_copy(0, where, values).view(moved.shape)
    moved = tensor.new_empty(*shape, *tensor.shape[2:])
    ends = [0] * shape[0]
    for (row, begin, length), (to_row, to, _) in sorted(zip(source, target, strict=True), key=lambda pair: pair[1]):
        moved[to_row, ends[to_row] : to] = fill
        moved[to_row, to : to + length] = tensor[row, begin : begin + length]
        ends[to_row] = to + length
    for row, end in enumerate(ends):
        moved[row, end:] = fill
    return moved


def _flat(runs: list[tuple[int, int, int]], width: int) -> list[int]:
    return [row * width + begin for row, begin, length in runs if length]


def _positions(runs: list[tuple[int, int, int]], width: int) -> Tensor:
    ranges = [torch.arange(row * width + begin, row * width + begin + length) for row, begin, length in runs]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
