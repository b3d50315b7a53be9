"""Layouts of tokens: padded batches `[B, S]`, packed rows `[R, N]`, and one rank's contiguous slice of either.

A `Packing` places token ids, masks and routing alike, so that what belongs to one token stays together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
            RoutingError: a mask of another shape or dtype, tokens of a sample that are no single run, or that are more
                than `row_length`.
        """
        if mask.dim() != 2 or mask.is_floating_point():
            raise RoutingError(
                f"mask: expected bool or integer [B, S], true on tokens, got {mask.dtype} {tuple(mask.shape)}"
            )
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
                f"row_length: expected at least the longest sample, got {row_length}. Raise it, or cut the samples:"
                f"{summary(too_long)}"
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
        b, s = mask.shape
        return cls(tuple(places), (b, s), (len(filled), _width(max(filled), multiple_of)))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, tokens: int, *, multiple_of: int = 1) -> "Packing":
        """Packing of one row of `tokens` tokens whose sequences are bounded by `cu_seqlens`; unpacks right-padded.

        Args:
            cu_seqlens: integers `[B + 1]`, from 0 to `tokens`.
            tokens: what the row holds without its padding, to check the bounds against.
            multiple_of: the row's length N is `tokens` rounded up to a multiple of it.

        Raises:
            RoutingError: bounds that do not begin at 0, fall, or do not end at `tokens`.
        """
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        lengths = [b - a for a, b in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or min(lengths) < 0 or bounds[-1] != tokens:
            shown = ", ".join(map(str, bounds[:SHOWN])) + (f", ... {bounds[-1]}" if len(bounds) > SHOWN else "")
            raise RoutingError(
                f"cu_seqlens: expected bounds that rise from 0 to the {tokens} tokens of the row, got [{shown}]. "
                "Padding at the row's end is no sequence: leave it out of both, and let multiple_of add it"
            )
        places = tuple(Place(b, 0, n, 0, at) for b, (n, at) in enumerate(zip(lengths, bounds, strict=False)))
        return cls(places, (len(lengths), max(lengths)), (1, _width(tokens, multiple_of)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each sample."""
        return tuple(place.length for place in self.places)

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(self.lengths)

    def pack(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """`[B, S, ...]` -> `[R, N, ...]`, with `fill` on padding; shares memory where nothing has to move.

        Raises:
            RoutingError: not of the batch's shape, or a `fill` that the dtype does not hold.
        """
        self._require(tensor, self.batch_shape)
        source = [(p.sample, p.start, p.length) for p in self.places]
        return _moved(tensor, self.shape, source, [(p.row, p.offset, p.length) for p in self.places], fill)

    def unpack(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """`[R, N, ...]` -> `[B, S, ...]`, the inverse of `pack`.

        Raises:
            RoutingError: not of the packed rows' shape, or a `fill` that the dtype does not hold.
        """
        self._require(tensor, self.shape)
        source = [(p.row, p.offset, p.length) for p in self.places]
        return _moved(tensor, self.batch_shape, source, [(p.sample, p.start, p.length) for p in self.places], fill)

    def position_ids(self, device: torch.device | str = "cpu", *, multimodal: Tensor | None = None) -> Tensor:
        """int64 `[R, N]`, from 0 in each sequence; 0 on padding: each such position is a sequence of its own.

        Args:
            device: of the result.
            multimodal: `[3, B, S]`, positions of the batch by time, height and width, as a vision-language model makes
                them (`get_rope_index`). The result is then `[4, R, N]`: the above, and these at their places.

        Raises:
            RoutingError: `multimodal` of another shape.
        """
        ids = torch.zeros(self.shape, dtype=torch.int64)
        count = torch.arange(max(self.lengths, default=0))
        for place in self.places:
            ids[place.row, place.offset : place.offset + place.length] = count[: place.length]
        ids = ids.to(device)
        if multimodal is None:
            return ids
        if multimodal.dim() != 3 or multimodal.shape[0] != 3:
            raise RoutingError(
                f"multimodal: expected positions [3, B, S] with (B, S) = {self.batch_shape}, got "
                f"{tuple(multimodal.shape)}"
            )
        return torch.stack([ids, *(self.pack(part).to(ids) for part in multimodal)])

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """int32: bounds of the sequences in the flattened rows. A row's padding is one too; empty ones are none."""
        bounds = {0, self.shape[0] * self.shape[1]}
        for p in self.places:
            begin = p.row * self.shape[1] + p.offset
            bounds |= {begin, begin + p.length}
        return torch.tensor(sorted(bounds), dtype=torch.int32, device=device)

    def _require(self, tensor: Tensor, shape: tuple[int, int]) -> None:
        if tuple(tensor.shape[:2]) != shape:
            raise RoutingError(
                f"tensor: expected a shape that begins with {shape}, got {tuple(tensor.shape)}. This packing is of a "
                f"batch {self.batch_shape} in packed rows {self.shape}"
            )


def pad(tensor: Tensor, length: int, *, left: bool = False, fill: float | bool = 0, dim: int = 1) -> Tensor:
    """`tensor` with `fill` after (or before) it, up to `length` along `dim`; itself if nothing is missing.

    Raises:
        RoutingError: longer than `length`, or a `fill` that the dtype does not hold.
    """
    _require_fill(tensor, fill)
    missing = length - tensor.shape[dim]
    if missing < 0:
        raise RoutingError(f"length: expected at least the {tensor.shape[dim]} positions there are, got {length}")
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    padding = tensor.new_full((), fill).expand(shape)
    return torch.cat([padding, tensor] if left else [tensor, padding], dim)


def shard(tensor: Tensor, rank: int, size: int, *, fill: float | bool = 0, dim: int = 1) -> Tensor:
    """The contiguous slice of `rank` out of `size` along `dim`, which is padded with `fill` to a multiple of `size`.

    Shares memory except where padding is needed.

    Raises:
        RoutingError: no such rank.
    """
    if not 0 <= rank < size:
        raise RoutingError(f"rank: expected 0 to {size - 1}, got {rank} of {size} ranks")
    length = tensor.shape[dim]
    width = -(-length // size)
    begin = min(rank * width, length)
    return pad(tensor.narrow(dim, begin, min(width, length - begin)), width, fill=fill, dim=dim)


def unshard(slices: Sequence[Tensor], length: int, *, dim: int = 1) -> Tensor:
    """The tensor of `length` along `dim` whose slices these are, by rank: the inverse of `shard`.

    Raises:
        RoutingError: no slices, slices that differ in shape, or that are not those of `length`.
    """
    shapes = [tuple(part.shape) for part in slices]
    width = -(-length // max(len(slices), 1))
    if len(set(shapes)) != 1 or shapes[0][dim] != width:
        raise RoutingError(
            f"slices: expected one of each rank, of one shape with {width} positions (length {length} over "
            f"{len(slices)} ranks), got{summary(f'rank {rank}: {shape}' for rank, shape in enumerate(shapes))}"
        )
    padded = slices[0] if len(slices) == 1 else torch.cat(list(slices), dim)
    return padded.narrow(dim, 0, length)


Runs = list[tuple[int, int, int]]  # (row, begin, length) of each sequence


def _moved(tensor: Tensor, shape: Sequence[int], source: Runs, target: Runs, fill: float | bool) -> Tensor:
    """`tensor` `[X, Y, ...]` with its runs at other places of `shape`, and `fill` elsewhere."""
    _require_fill(tensor, fill)
    tokens = sum(length for _, _, length in target)
    if tokens == tensor.shape[0] * tensor.shape[1] == shape[0] * shape[1] and (
        _flat(source, tensor.shape[1]) == _flat(target, shape[1])
    ):
        return tensor.reshape(*shape, *tensor.shape[2:])
    if len(target) == 1 and shape[0] == 1 and target[0] == (0, 0, shape[1]):
        row, begin, length = source[0]
        return tensor[row : row + 1, begin : begin + length]
    return _Move.apply(tensor, shape, source, target, fill)  # pyrefly: ignore


class _Move(torch.autograd.Function):
    """One write into fresh memory. The gradient goes back the same way: autograd's own would be a copy of the whole
    for each of the runs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shape: Sequence[int], source: Runs, target: Runs, fill: float) -> Tensor:
        ctx.back = tensor.shape[:2], target, source
        moved = tensor.new_empty(*shape, *tensor.shape[2:])
        ends = [0] * shape[0]
        for (row, begin, length), (to_row, to, _) in sorted(zip(source, target, strict=True), key=lambda pair: pair[1]):
            moved[to_row, ends[to_row] : to] = fill
            moved[to_row, to : to + length] = tensor[row, begin : begin + length]
            ends[to_row] = to + length
        for row, end in enumerate(ends):
            moved[row, end:] = fill
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        shape, source, target = ctx.back
        return _moved(gradients[0], shape, source, target, 0), None, None, None, None


def _require_fill(tensor: Tensor, fill: float | bool) -> None:
    """torch would write 255 for -1 into uint8: an expert's id in the place of a row that is missing."""
    if fill < 0 and not tensor.dtype.is_signed:
        raise RoutingError(f"fill: expected a value of {tensor.dtype}, got {fill}; use a signed dtype")


def _flat(runs: Runs, width: int) -> list[int]:
    return [row * width + begin for row, begin, length in runs if length]


def _width(tokens: int, multiple_of: int) -> int:
    if multiple_of < 1:
        raise RoutingError(f"multiple_of: expected 1 or more, got {multiple_of}")
    return max(-(-tokens // multiple_of), 1) * multiple_of
