"""The tensors of a training step: rollouts of all ranks, and rows of one rank.

Shapes: B rollouts, S positions, R rows and N positions of one rank's slice of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r3.capture import RolloutBatch
from r3.errors import CaptureError
from r3.parallel import IGNORED, Mesh, next_tokens
from r3.routing import Packing, RolloutRouting, shard
from r3.routing.checks import require_same_rows
from r3.sampling_mask import SamplingMask
from trainer_hooks.micro_batches import even_groups


@dataclass
class StepBatch:
    """The rollouts of a step as tensors, with an advantage and the rollout's number in the step for each.

    Raises:
        CaptureError: advantages or numbers of more or fewer rollouts.
    """

    batch: RolloutBatch
    advantages: Tensor  # [B]
    sample_ids: Tensor  # [B]

    def __post_init__(self) -> None:
        rollouts = len(self.batch.input_ids)
        if self.advantages.shape != (rollouts,) or self.sample_ids.shape != (rollouts,):
            raise CaptureError(
                f"expected an advantage and a number of each of {rollouts} rollouts, got "
                f"{tuple(self.advantages.shape)} and {tuple(self.sample_ids.shape)}"
            )

    @classmethod
    def of(cls, batch: RolloutBatch, advantages: Tensor) -> "StepBatch":
        """All rollouts of a step, numbered in their order."""
        return cls(batch, advantages, torch.arange(len(advantages)))

    def select(self, samples: slice | list[int]) -> "StepBatch":
        return StepBatch(self.batch.select(samples), self.advantages[samples], self.sample_ids[samples])

    def split(self, size: int) -> Iterator["StepBatch"]:
        """Parts of at most `size` rollouts."""
        for at in range(0, len(self.advantages), size):
            yield self.select(slice(at, at + size))

    def rows(self, mesh: Mesh, *, size: int, packed: bool, tokens: int = 0) -> Iterator["Rows"]:
        """The rows of this rank's rollouts, a forward at a time.

        Args:
            mesh: of the ranks; those of one data rank share rows.
            size: rollouts in a forward; every `mesh.data_size`-th is this rank's.
            tokens: instead, the most tokens in a forward, over which rollouts are spread evenly; 0 counts rollouts.
            packed: several rollouts a row.

        Raises:
            CaptureError: no rollouts, or a number that would give the ranks different numbers of forwards, in which
                every rank takes part; on all ranks.
        """
        rollouts, ranks = len(self.advantages), mesh.data_size
        if rollouts < ranks or (not tokens and rollouts % ranks):
            raise CaptureError(
                f"rollouts of an update: expected {'at least' if tokens else 'a multiple of'} {ranks}, the ranks with "
                f"rows of their own, got {rollouts}; every rank takes part in every forward"
            )
        if tokens:
            lengths = self.batch.attention_mask.sum(1).tolist()
            groups = even_groups(lengths, most=tokens, multiple_of=ranks)[mesh.data_rank :: ranks]
            parts = (self.select(group) for group in groups)
        else:
            parts = self.select(slice(mesh.data_rank, None, ranks)).split(size)
        for part in parts:
            yield Rows.of(part, packed=packed).shard(mesh.sequence_rank, mesh.sequence_size)


@dataclass(kw_only=True)
class Rows:
    """One forward's rows `[R, N]`. Entry t of `labels`, `logprobs` and `advantages` is of the token after position t.

    Attributes:
        input_ids, position_ids: int64; positions restart with each rollout, and on padding.
        tokens: bool, False on padding.
        labels: int64, the next token where it was sampled, else -100.
        logprobs: float32, the rollout's, in nats; 0 where there is no label.
        advantages: float32; 0 where there is no label.
        sample_ids: int64, which rollout of the step the label is of; 0 where there is no label.
        routing: of the positions' own tokens; None if it was not captured.
        sampling_mask: the ids that each label was sampled from; None if they are the whole vocabulary.

    Raises:
        CaptureError: parts of other [R, N] than `input_ids`.
    """

    input_ids: Tensor
    position_ids: Tensor
    tokens: Tensor
    labels: Tensor
    logprobs: Tensor
    advantages: Tensor
    sample_ids: Tensor
    routing: RolloutRouting | None = None
    sampling_mask: SamplingMask | None = None

    def __post_init__(self) -> None:
        require_same_rows(tuple(self.input_ids.shape), vars(self), CaptureError)

    @classmethod
    def of(cls, part: StepBatch, *, packed: bool) -> "Rows":
        """Right-padded rows, one a rollout; or packed ones as long as the longest rollout, and so never more work."""
        batch = part.batch
        tokens = batch.attention_mask.bool()
        advantages, sample_ids = (each[:, None].expand(tokens.shape) for each in (part.advantages, part.sample_ids))
        if packed:
            packing = Packing.from_mask(tokens, row_length=int(tokens.sum(1).max()))
            place: Callable[[Tensor], Tensor] = packing.pack
            routing = None if batch.routing is None else batch.routing.pack(packing)
            position_ids = packing.position_ids()
        else:
            place, routing = torch.Tensor.contiguous, batch.routing
            position_ids = (tokens.cumsum(1) - 1) * tokens
        input_ids = place(batch.input_ids)
        labels = next_tokens(input_ids, position_ids)
        labels = labels.masked_fill(~place(batch.response_mask).roll(-1, 1), IGNORED)
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            tokens=place(tokens),
            labels=labels,
            # Shifted like the labels, before anything is sliced.
            logprobs=place(batch.logprobs).roll(-1, 1).masked_fill(labels == IGNORED, 0),
            advantages=place(advantages).roll(-1, 1).masked_fill(labels == IGNORED, 0),
            sample_ids=place(sample_ids).masked_fill(labels == IGNORED, 0),
            routing=routing,
            sampling_mask=batch.sampling_mask and _of_labels(batch.sampling_mask, place, labels),
        )

    @property
    def mask(self) -> Tensor:
        """bool, True where there is a label."""
        return self.labels != IGNORED

    def shard(self, rank: int, size: int) -> "Rows":
        """The contiguous slice of `rank` out of `size`."""
        if size == 1:
            return self

        def sliced(name: str, part: Any) -> Any:
            if part is None or isinstance(part, RolloutRouting):
                return part and part.shard(rank, size)
            if isinstance(part, SamplingMask):
                return part.take(shard(part.positions(), rank, size, fill=-1))
            return shard(part, rank, size, fill=IGNORED if name == "labels" else 0)

        return Rows(**{item.name: sliced(item.name, getattr(self, item.name)) for item in fields(self)})

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Rows":
        """The same rows on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Rows":
        """The same rows in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "Rows":
        parts: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        return Rows(**{name: change(part) for name, part in parts.items() if part is not None})


def _of_labels(mask: SamplingMask, place: Callable[[Tensor], Tensor], labels: Tensor) -> SamplingMask:
    """The sets of the labels, from those of the tokens of a batch, which `place` moves to rows."""
    # Shifted like the labels.
    return mask.take(place(mask.positions()).roll(-1, 1).masked_fill(labels == IGNORED, -1))


def broadcast(whole: StepBatch | None) -> StepBatch:
    """The first rank's batch, on all ranks."""
    if dist.get_world_size() == 1:
        assert whole is not None
        return whole
    holder = [whole]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    assert holder[0] is not None
    return holder[0]
