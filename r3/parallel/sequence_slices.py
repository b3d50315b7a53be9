"""Which positions of a row belong to one sequence, read from position ids that restart."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of rows `[B, S]`.

    Args:
        position_ids: int64 `[B, S]`; a sequence goes on for as long as they rise by one.
        padding: bool `[B, S]`, True where there is no token: each such position is a sequence of its own. None if there
            is no padding, or position ids mark it (0 on each).
    """

    position_ids: Tensor
    padding: Tensor | None = None

    @cached_property
    def starts(self) -> Tensor:
        """bool `[B, S]`, True where a sequence begins."""
        starts = self.position_ids.diff(prepend=self.position_ids[:, :1]) != 1  # True at 0: the difference is 0 there
        if self.padding is not None:
            starts = starts | self.padding
            starts[:, 1:] |= self.padding[:, :-1]
        return starts

    @cached_property
    def index(self) -> Tensor:
        """int64 `[B, S]`, the number of each position's sequence in its row."""
        return self.starts.cumsum(1)

    @cached_property
    def one_a_row(self) -> bool:
        """Whether each row is one sequence from position 0. Waits for the device."""
        return not bool(self.starts[:, 1:].any() | self.position_ids[:, 0].any())

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, int]:
        """int32 `[sequences + 1]`, bounds of all sequences in the flattened rows, and the longest length.

        Waits for the device.
        """
        starts = self.starts.flatten().nonzero().squeeze(1)
        bounds = torch.nn.functional.pad(starts, (0, 1), value=self.starts.numel()).to(torch.int32)
        return bounds, int(bounds.diff().max())
