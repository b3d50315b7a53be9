"""What a rollout could sample from: the ids that top-p, top-k and min-p left of the vocabulary, token by token.

A policy that is trained over the whole vocabulary is another distribution than the one that sampled, and importance
ratios are wrong wherever the vocabulary was cut. With the sets of the rollout the trainer normalises over the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r3.errors import CaptureError, summary


@dataclass(frozen=True, eq=False)
class SamplingMask:
    """The set that each token was sampled from, over positions `[...]`, ragged.

    Attributes:
        sizes: int64 `[...]`, number of ids in each set; 0 where a token has none, as in prompts and on padding, or was
            sampled from the whole vocabulary.
        token_ids: int32 `[sizes.sum()]`, the ids of all sets, in the order of the positions.
    """

    sizes: Tensor
    token_ids: Tensor

    def __post_init__(self) -> None:
        if self.sizes.dtype != torch.int64 or self.token_ids.dtype != torch.int32 or self.token_ids.dim() != 1:
            raise CaptureError(
                "sampling mask: expected sizes int64 [...] and token_ids int32 [sum of sizes], got "
                f"{self.sizes.dtype} {tuple(self.sizes.shape)} and {self.token_ids.dtype} "
                f"{tuple(self.token_ids.shape)}"
            )

    @classmethod
    def of(cls, sizes: Any, token_ids: Any, sampled: Sequence[int], *, first: int = 0) -> SamplingMask:
        """`[first + G]`, from the sets of G sampled tokens, which follow `first` tokens without one.

        Args:
            sizes: integers `[G]`, number of ids in each set.
            token_ids: integers, the ids of all sets, one set after the other.
            sampled: the G token ids.
            first: tokens of the prompt.

        Raises:
            CaptureError: sets of another number of tokens, a repeated or negative id, or a set without the token that
                was sampled from it.

        Example:
            >>> SamplingMask.of([2, 1], [3, 7, 5], sampled=[7, 5], first=2).sizes
            tensor([0, 0, 2, 1])
        """
        counts = torch.as_tensor(sizes, dtype=torch.int64)
        ids = torch.as_tensor(token_ids, dtype=torch.int32)
        drawn = torch.tensor(sampled, dtype=torch.int32)
        if counts.shape != drawn.shape or len(ids) != int(counts.sum()):
            raise CaptureError(
                f"sampling mask: expected a set of each of {len(drawn)} sampled tokens, got {len(counts)} sets of "
                f"{int(counts.sum())} ids together, and {len(ids)} ids"
            )
        places = torch.arange(len(counts)).repeat_interleave(counts)
        has_own = torch.zeros(len(counts), dtype=torch.bool)
        has_own[places[ids == drawn[places]]] = True
        keys = (places << 32 | ids).sort().values
        repeated = (keys[1:][keys[1:] == keys[:-1]] >> 32).unique()
        wrong = sorted({*(~has_own).nonzero()[:, 0].tolist(), *repeated.tolist(), *places[ids < 0].tolist()})
        if wrong:
            sets = ids.split(counts.tolist())
            shown = (f"token {place}, {sampled[place]}: {sets[place].tolist()!s:.80}" for place in wrong)
            raise CaptureError(
                f"sampling mask: expected sets of different ids from 0 on, each with its own token, got{summary(shown)}"
            )
        return cls(torch.cat([counts.new_zeros(first), counts]), ids)

    @classmethod
    def cat(cls, parts: Sequence[SamplingMask], length: int, *, starts: Sequence[int] | None = None) -> SamplingMask:
        """`[B, length]`, from one `[S_b]` of each rollout, padded on the right.

        Args:
            parts: of each rollout.
            length: positions of the batch.
            starts: position of each part's first one, by default 0: the padding on the left of a prompt.

        Raises:
            CaptureError: a part that ends after `length`, or that has no start from 0 up.
        """
        starts = [0] * len(parts) if starts is None else starts
        if len(starts) != len(parts) or min(starts, default=0) < 0:
            raise CaptureError(f"starts: expected {len(parts)} positions from 0 up, one a part, got {list(starts)}")
        longest = max((start + len(part.sizes) for start, part in zip(starts, parts, strict=True)), default=0)
        if longest > length:
            raise CaptureError(f"length: expected at least {longest}, got {length}")
        sizes = torch.zeros(len(parts), length, dtype=torch.int64)
        for row, start, part in zip(sizes, starts, parts, strict=True):
            row[start : start + len(part.sizes)] = part.sizes
        return cls(sizes, torch.cat([torch.zeros(0, dtype=torch.int32), *(part.token_ids for part in parts)]))

    @property
    def shape(self) -> torch.Size:
        """`[...]`."""
        return self.sizes.shape

    def take(self, positions: Tensor) -> SamplingMask:
        """The sets of the given positions, in their order.

        Args:
            positions: int64 of any shape, places in the flattened `[...]`; -1 for no set.
        """
        flat = positions.reshape(-1)
        place = flat.clamp(min=0)
        sizes = self.sizes.reshape(-1)[place].masked_fill_(flat < 0, 0)
        starts = self._ends()[place] - self.sizes.reshape(-1)[place]
        before = sizes.cumsum(0) - sizes
        index = torch.repeat_interleave(starts - before, sizes)
        index += torch.arange(len(index), device=index.device)
        return SamplingMask(sizes.view(positions.shape), self.token_ids[index])

    def select(self, samples: slice | list[int]) -> SamplingMask:
        """The chosen ones of the first dimension."""
        return self.take(self.positions()[samples])

    def positions(self) -> Tensor:
        """int64 `[...]`, the place of each position: to be moved like the tokens, then given to `take`."""
        return torch.arange(self.sizes.numel(), device=self.sizes.device).view(self.shape)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SamplingMask:
        """The same on `device`."""
        return SamplingMask(
            self.sizes.to(device, non_blocking=non_blocking), self.token_ids.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> SamplingMask:
        """The same in page-locked memory."""
        return SamplingMask(self.sizes.pin_memory(), self.token_ids.pin_memory())

    def _ends(self) -> Tensor:
        return self.sizes.reshape(-1).cumsum(0)
