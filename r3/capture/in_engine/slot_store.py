"""Rows of routing by KV slot, as vLLM's prefix cache keeps keys and values: a block that is reused brings its rows.

A slot is `block id * block size + offset`. L decoder layers, K slots of a row.
"""

from collections.abc import Mapping, Sequence

import numpy as np


class SlotStore:
    """Expert ids `[slots, L, K]` in host memory.

    Args:
        ids: the array; it is written to.
        block_size: tokens a block.
        group: which of the engine's KV cache groups the blocks belong to.
    """

    def __init__(self, ids: np.ndarray, block_size: int, group: int) -> None:
        self.group = group
        self.block_size = block_size
        self._ids = ids
        # View each row as one item, so that numpy copies it as one.
        row_bytes = ids.itemsize * ids.shape[1] * ids.shape[2]
        self._rows = ids.reshape(len(ids), -1).view(np.dtype((np.void, row_bytes))).ravel()
        self._offsets = np.arange(block_size)

    def write(self, slots: np.ndarray, ids: np.ndarray) -> None:
        """Put the rows `ids`, integer `[n, L, K]`, at `slots`, `[n]`."""
        self._ids[slots] = ids

    def slots(self, blocks: Sequence[int], start: int, end: int) -> np.ndarray:
        """Slots of the positions [start, end) of a sequence stored in `blocks`."""
        first, last = start // self.block_size, -(-end // self.block_size)
        held = np.asarray(blocks[first:last], dtype=np.int64)[:, None] * self.block_size + self._offsets
        return held.ravel()[start - first * self.block_size : end - first * self.block_size]

    def read(self, blocks: Sequence[int], start: int, end: int) -> np.ndarray:
        """A copy `[end - start, L, K]` of the rows of these positions."""
        rows = self._rows[self.slots(blocks, start, end)]
        return rows.view(self._ids.dtype).reshape(-1, *self._ids.shape[1:])


def step_positions(scheduler_output: object, request_ids: Sequence[str]) -> list[tuple[str, int, int]]:
    """(request, first position, position after the last) of each request of a step, in the order of its rows."""
    new, cached = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs  # type: ignore[attr-defined]
    begins: Mapping[str, int] = {
        **{request.req_id: request.num_computed_tokens for request in new},
        **dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True)),
    }
    counts = scheduler_output.num_scheduled_tokens  # type: ignore[attr-defined]
    return [(rid, begins[rid], begins[rid] + counts[rid]) for rid in request_ids]
