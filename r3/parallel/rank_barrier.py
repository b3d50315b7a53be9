"""Collective error propagation: no rank continues after another one has failed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from r3.errors import ParallelError, summary


class RankBarrier:
    """All ranks of `group` go on together, or each of them raises and names the rank that failed and why.

    Without it a rank that raises alone leaves the others waiting in their next collective. All ranks must come here
    equally often and in the same order: one that never comes is what `timeout_s` is for.

    Args:
        group: the ranks; None for all.
        timeout_s: longest wait for the others.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float = 600.0) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._size = dist.get_world_size(group)
        # On the CPU if the group supports it: the exchange then does not wait for queued device work.
        on_cpu = "cpu" in dist.get_backend_config(group)
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def exchange(self, problem: str | None, facts: Sequence[int] = ()) -> Tensor:
        """Tell the others of a `problem`, or of `facts` if there is none.

        Returns:
            int64 `[ranks, len(facts)]`, every rank's facts.

        Raises:
            ParallelError: on every rank, if one had a problem or did not answer within `timeout_s`.
        """
        mine = torch.tensor([problem is not None, *facts], dtype=torch.int64, device=self._device)
        everyone = [torch.empty_like(mine) for _ in range(self._size)]
        try:
            work = dist.all_gather(everyone, mine, group=self._group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=self._timeout_s))
            gathered = torch.stack(everyone).cpu()
        except RuntimeError as error:
            raise ParallelError(
                f"rank {dist.get_rank()}: expected all {self._size} ranks of the group to come here within "
                f"{self._timeout_s:g} s, they did not: one has ended, or waits elsewhere ({error})"
            ) from error
        if gathered[:, 0].any():
            messages: list[str | None] = [None] * self._size
            dist.all_gather_object(messages, problem, group=self._group)
            ranks = dist.get_process_group_ranks(self._group)
            failed = [f"rank {rank}: {text}" for rank, text in zip(ranks, messages, strict=True) if text is not None]
            raise ParallelError(f"{len(failed)} of {self._size} ranks cannot go on:{summary(failed)}")
        return gathered[:, 1:]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An exception that one rank raises inside is a `ParallelError` on all the others.

        Example:
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> with RankBarrier().guard():
            ...     rows = torch.ones(4).split(2)  # what may raise on one rank alone
            >>> dist.destroy_process_group()
        """
        try:
            yield
        except Exception as error:
            with suppress(ParallelError):
                self.exchange(f"{type(error).__name__}: {error}")
            raise
        self.exchange(None)
