"""The sequences that TRL trains on, put together from the engine's answers to its turns.

Shapes: B rows, S positions; P tokens of a prompt, G of a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r3.capture import Rollout, SamplingMask, stitch
from r3.errors import CaptureError
from r3.routing import RolloutRouting


@dataclass(frozen=True)
class ReplayedRows:
    """What the rollouts decided for rows `[B, S]`.

    Attributes:
        routing: `[B, S, L, K]`.
        sampling_mask: `[B, S]`, the ids that each token was sampled from; None for the whole vocabulary.
    """

    routing: RolloutRouting
    sampling_mask: SamplingMask | None

    def select(self, rows: list[int]) -> "ReplayedRows":
        """The chosen rows, in their order."""
        mask = self.sampling_mask
        return ReplayedRows(self.routing.select(rows), mask and mask.select(rows))


class Turns:
    """The rollouts of all turns of a generation step.

    The first turn has one rollout a sequence. TRL asks again for those that called a tool, in the same order: their
    prompts then hold all that came before.
    """

    def __init__(self) -> None:
        self._turns: list[list[Rollout]] = []

    def add(self, rollouts: list[Rollout]) -> None:
        self._turns.append(rollouts)

    def joined(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> "Sequences":
        """The sequences that TRL made of them.

        Args:
            prompt_ids: of each sequence.
            completion_ids: of each, the answers of tools among them; TRL may have cut them.

        Raises:
            CaptureError: a sequence that is not made of these turns.
        """
        whole = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        chains = self._chains(whole)
        return Sequences([_joined(chain, ids, i) for i, (chain, ids) in enumerate(zip(chains, whole, strict=True))])

    def _chains(self, whole: Sequence[list[int]]) -> list[list[Rollout]]:
        """The turns of each sequence."""
        first = self._turns[0] if self._turns else []
        if len(first) != len(whole):
            raise CaptureError(f"expected a first turn of each of {len(whole)} sequences, got {len(first)}")
        chains = [[rollout] for rollout in first]
        for turn in self._turns[1:]:
            after = 0
            for rollout in turn:
                found = next((i for i in range(after, len(whole)) if _continues(chains[i], rollout, whole[i])), None)
                if found is None:
                    raise CaptureError(
                        f"a later turn with a prompt of {len(rollout.prompt_ids)} tokens: expected it to continue one "
                        "of the sequences, it continues none"
                    )
                chains[found].append(rollout)
                after = found + 1
        return chains


class Sequences:
    """The rollouts of the sequences of a generation step, and where TRL's rows have their tokens.

    Args:
        rollouts: of each sequence, `[1, P + G, L, K]` of routing each.
    """

    def __init__(self, rollouts: list[Rollout]) -> None:
        self._routing = [rollout.routing for rollout in rollouts if rollout.routing is not None]
        self._masks = [rollout.sampling_mask for rollout in rollouts if rollout.sampling_mask is not None]
        self._ids = [[*rollout.prompt_ids, *rollout.token_ids] for rollout in rollouts]
        self._prompts = [len(rollout.prompt_ids) for rollout in rollouts]

    @property
    def replayed_share(self) -> float:
        """Share of tokens with a row; the one that a sequence ends with has none."""
        return sum(part.rows_valid for part in self._routing) / max(1, sum(map(len, self._ids)))

    @property
    def set_sizes(self) -> Tensor:
        """int64 `[n]`, how many ids each of the sampled tokens had to itself and others; empty without sets."""
        sizes = torch.cat([mask.sizes for mask in self._masks]) if self._masks else torch.zeros(0, dtype=torch.int64)
        return sizes[sizes > 0]

    def placed(self, input_ids: Tensor, prompt_columns: int) -> ReplayedRows:
        """For rows whose prompts, padded on the left, end before `prompt_columns`.

        By place and not by attention mask: TRL masks completions that were cut (`mask_truncated_completions`).

        Args:
            input_ids: `[B, S]`, one row a sequence, to check the places against.
            prompt_columns: columns of the prompts.

        Raises:
            CaptureError: other tokens in these places.
        """
        rows = input_ids.cpu()
        starts = [prompt_columns - prompt for prompt in self._prompts]
        if len(rows) != len(self._ids):
            raise CaptureError(f"expected rows of {len(self._ids)} sequences, got {len(rows)}")
        for i, (row, ids, start) in enumerate(zip(rows, self._ids, starts, strict=True)):
            if start < 0 or row[start : start + len(ids)].tolist() != ids:
                raise CaptureError(
                    f"sequence {i}: expected its {len(ids)} tokens from column {start} on, got others. TRL lays its "
                    "rows out in another way than r3's hook knows"
                )
        length = rows.shape[1]
        return ReplayedRows(
            RolloutRouting.cat(self._routing, length=length, starts=starts),
            SamplingMask.cat(self._masks, length, starts=starts) if self._masks else None,
        )


def _continues(chain: list[Rollout], rollout: Rollout, whole: list[int]) -> bool:
    before, prompt = [*chain[-1].prompt_ids, *chain[-1].token_ids], rollout.prompt_ids
    return len(prompt) > len(before) and prompt[: len(before)] == before and whole[: len(prompt)] == prompt


def _joined(chain: list[Rollout], ids: list[int], number: int) -> Rollout:
    joined = chain[0] if len(chain) == 1 else stitch(chain)
    if len(ids) < len(joined):
        joined = joined.truncate(len(ids))
    if [*joined.prompt_ids, *joined.token_ids] != ids:
        raise CaptureError(f"sequence {number}: expected the tokens that the engine read and sampled, got others")
    return joined


def row_numbers(step: int, sequences: int) -> Tensor:
    """int64 `[B, 2]`: the generation step and the number of each sequence, which TRL shuffles with its rows."""
    return torch.stack([torch.full((sequences,), step), torch.arange(sequences)], dim=1)
