"""Schedules of faults for a pool of three real engines, each made from a seed.

python tests/faults/pool_schedules.py --schedules 20 --seed 0     # seeds 0 to 19
python tests/faults/pool_schedules.py --only 7                    # one of them again
python tests/faults/pool_schedules.py --minutes 8                 # as many as fit, from --seed on

Each schedule: rollouts, a weight sync, rollouts, with an engine that is killed, stopped, slow, joins or leaves in one
of them. It must end with every rollout there once, of the tokens that the weights it names give; and with a sync that
has committed on every engine of the pool, or a named error and a next sync that heals.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

POINTS = ("r3_reserve", "r3_begin", "r3_load", "r3_seal", "r3_commit", "r3_release")
KINDS = {"stopped": 6, "stopped for long": 6, "slow": 4, "leaves": 3, "joins": 4, "killed": 2, "none": 1}
"""Kind -> how often. A killed engine costs its start."""
PHASES = ("rollouts", "sync", "rollouts after")


@dataclass(frozen=True, kw_only=True)
class PoolFault:
    """Attributes:
    kind: of `KINDS`.
    phase: of `PHASES`.
    point: the call of the sync before which it happens, in a sync.
    after_s: into the rollouts, in rollouts.
    engine: which of three.
    whole: whether all processes of the server, or the engine core below its HTTP server alone.
    """

    kind: str
    phase: str
    point: str
    after_s: float
    engine: int
    whole: bool

    def __str__(self) -> str:
        where = f"before {self.point}" if self.phase == "sync" else f"{self.after_s:.1f} s into {self.phase}"
        what = "server" if self.whole else "core"
        return f"engine {self.engine} {self.kind} ({what}) {where}"


@dataclass(frozen=True, kw_only=True)
class PoolSchedule:
    seed: int
    weights: str
    transport: str
    on_lost: str
    samples: int
    fault: PoolFault

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.transport} to {self.weights}, on_lost={self.on_lost} | {self.fault}"


def pool_schedule(seed: int) -> PoolSchedule:
    """The schedule of `seed`, always the same."""
    of = random.Random(f"pool {seed}")
    kind = of.choices(list(KINDS), list(KINDS.values()))[0]
    return PoolSchedule(
        seed=seed,
        weights=of.choice("ABC"),
        transport=of.choice(["files", "gloo"]),
        on_lost=of.choice(["raise", "remove"]),
        samples=of.choice([1, 2]),
        fault=PoolFault(
            kind=kind,
            phase=of.choice(PHASES) if kind not in ("joins", "leaves") else of.choice(PHASES[::2]),
            point=of.choice(POINTS),
            after_s=of.uniform(0.0, 1.0),
            engine=of.randrange(3),
            whole=of.random() < 0.6,
        ),
    )


def seeds_of(options: argparse.Namespace) -> Sequence[int]:
    return options.only or range(options.seed, options.seed + options.schedules)


def main() -> int:
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]
    import conftest  # noqa: F401 (the environment of the tests, for what is started here)
    from pool_harness import PoolHarness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; each has the next seed")
    parser.add_argument("--only", type=int, nargs="+", help="run these seeds alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin none after that")
    parser.add_argument("--list", action="store_true", help="print the schedules, run nothing")
    options = parser.parse_args()
    schedules = [pool_schedule(seed) for seed in seeds_of(options)]
    if options.list:
        print(*schedules, sep="\n")
        return 0
    until = time.monotonic() + 60 * options.minutes
    with PoolHarness() as harness:
        for schedule in schedules:
            if time.monotonic() > until:
                break
            print(f"{schedule}\n    -> {harness.run(schedule)}", flush=True)
        print(harness.table(), flush=True)
    return 1 if harness.violations else 0


if __name__ == "__main__":
    sys.exit(main())
