"""Schedules of faults for two trainer ranks that sync three engines together, each made from a seed."""

import random
from dataclasses import dataclass

from pool_schedules import PHASES, PoolFault, PoolSchedule

ENGINE_KINDS = {"stopped": 4, "stopped for long": 4, "slow": 3, "leaves": 2, "joins": 2, "killed": 4}
RANK_KINDS = {"killed": 6, "stopped": 4, "stopped for long": 5, "slow": 2, "late": 3, "late for long": 3}
CUT_KINDS = {"cut off": 2, "cut off for long": 3}
"""Kind -> how often. The link of a host is set down, and up again."""

DRIVER_POINTS = ("begin", "r3_reserve", "offer", "join", "r3_begin", "gather", "r3_load", "transfer", "flush")
DRIVER_POINTS += ("r3_seal", "r3_commit", "r3_release", "committed", "end")
OTHER_POINTS = ("begin", "offer", "join", "gather", "transfer", "release", "flush", "committed", "end")


@dataclass(frozen=True, kw_only=True)
class RanksFault(PoolFault):
    """Attributes:
    rank: that it happens to, in a sync: 0, which drives, or 1. None: to an engine.
    point: what that rank, or the driving one, is about to do; "" for before the sync.
    first: whether in the first sync of a trainer, in which ranks and workers connect, or in its second.
    """

    rank: int | None
    first: bool

    def __str__(self) -> str:
        who = f"engine {self.engine}" if self.rank is None else f"rank {self.rank}"
        when = f"{self.after_s:.1f} s into {self.phase}"
        if self.phase == "sync":
            when = f"before {self.point or 'the sync'}{', its first' * self.first}"
        return f"{who} {self.kind}{'' if self.whole else ' (core)'} {when}"


def ranks_schedule(seed: int) -> PoolSchedule:
    """The schedule of `seed`, always the same."""
    of = random.Random(f"ranks {seed}")
    rank = of.choice([None, 0, 1])
    kinds = (ENGINE_KINDS if rank is None else RANK_KINDS) | CUT_KINDS
    kind = of.choices(list(kinds), list(kinds.values()))[0]
    phase = "sync" if rank is not None or of.random() < 0.6 else of.choice(PHASES[::2])
    if kind in ("joins", "leaves"):
        phase = of.choice(PHASES[::2])
    point = of.choice(DRIVER_POINTS if rank != 1 else OTHER_POINTS)
    return PoolSchedule(
        seed=seed,
        weights=of.choice("ABC"),
        transport="gloo",
        on_lost=of.choice(["raise", "remove"]),
        samples=of.choice([1, 2]),
        fault=RanksFault(
            kind=kind,
            phase=phase,
            point="" if kind.startswith("late") or (rank is not None and of.random() < 0.1) else point,
            after_s=of.uniform(0.0, 1.0),
            engine=of.randrange(3),
            whole=rank is not None or kind not in ("stopped", "stopped for long") or of.random() < 0.6,
            rank=rank,
            first=of.random() < 0.4,
        ),
    )
