"""What `measure` needs of a trainer: log-probabilities of a step's rollouts under its model."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from trainer_hooks.batches import Rows, StepBatch


class Scorer(Protocol):
    """A policy that scores rollouts: `Policy`, or any trainer's own."""

    @property
    def model(self) -> nn.Module:
        """What forwards are run with; replay is attached to it if the rollouts have routing."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The rollouts' own, with `decode`."""
        ...

    def rows(self, whole: StepBatch, size: int) -> Iterator[Rows]:
        """This rank's part of `whole` on its device, `size` rollouts at a time."""
        ...

    def logprobs(self, rows: Rows, *, replayed: bool) -> Tensor:
        """Float32 `[R, N]` log-probabilities in nats of `rows.labels`, at the sampling temperature.

        0 where there is no label. `replayed` says whether routing is replayed or live.
        """
        ...
