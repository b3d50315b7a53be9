"""The sequences that TRL trains on, put together from the engine's answers to its turns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r3.capture import Rollout, stitch
from r3.errors import CaptureError
from r3.routing import RolloutRouting


class Turns:
    """The rollouts of all turns of a generation step.

    The first turn has one rollout a sequence. TRL asks again for those that called a tool, in the same order: their
    prompts then hold all that came before.
    """

    def __init__(self) -> None:
        self._turns: list[list[Rollout]] = []

    def add(self, rollouts: list[Rollout]) -> None:
        self._turns.append(rollouts)

    def routing(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> "Routings":
        """The routing of the sequences that TRL made of them.

        Args:
            prompt_ids: of each sequence.
            completion_ids: of each, the answers of tools among them; TRL may have cut them.

        Raises:
            CaptureError: a sequence that is not made of these turns.
        """
        whole = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        chains = self._chains(whole)
        parts = [_routing(chain, ids, i) for i, (chain, ids) in enumerate(zip(chains, whole, strict=True))]
        return Routings(parts, whole, [len(prompt) for prompt in prompt_ids])

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


class Routings:
    """Routing of each sequence of a generation step, and where TRL's rows have its tokens.

    Args:
        parts: `[1, P + G, L, K]` of each sequence.
        ids: P + G token ids of each.
        prompts: P of each.
    """

    def __init__(self, parts: list[RolloutRouting], ids: list[list[int]], prompts: list[int]) -> None:
        self._parts = parts
        self._ids = ids
        self._prompts = prompts

    @property
    def replayed_share(self) -> float:
        """Share of tokens with a row; the one that a sequence ends with has none."""
        return sum(part.rows_valid for part in self._parts) / max(1, sum(map(len, self._ids)))

    def placed(self, input_ids: Tensor, prompt_columns: int) -> RolloutRouting:
        """`[B, S, L, K]` for rows whose prompts, padded on the left, end before `prompt_columns`.

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
        return RolloutRouting.cat(self._parts, length=rows.shape[1], starts=starts)


def _continues(chain: list[Rollout], rollout: Rollout, whole: list[int]) -> bool:
    before, prompt = [*chain[-1].prompt_ids, *chain[-1].token_ids], rollout.prompt_ids
    return len(prompt) > len(before) and prompt[: len(before)] == before and whole[: len(prompt)] == prompt


def _routing(chain: list[Rollout], ids: list[int], number: int) -> RolloutRouting:
    joined = chain[0] if len(chain) == 1 else stitch(chain)
    if len(ids) < len(joined):
        joined = joined.truncate(len(ids))
    if [*joined.prompt_ids, *joined.token_ids] != ids:
        raise CaptureError(f"sequence {number}: expected the tokens that the engine read and sampled, got others")
    assert joined.routing is not None
    return joined.routing


def row_numbers(step: int, sequences: int) -> Tensor:
    """int64 `[B, 2]`: the generation step and the number of each sequence, which TRL shuffles with its rows."""
    return torch.stack([torch.full((sequences,), step), torch.arange(sequences)], dim=1)
