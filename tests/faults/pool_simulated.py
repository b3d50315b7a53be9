"""The schedules of `pool_schedules`, against simulated servers: hundreds in minutes.

python tests/faults/pool_simulated.py --schedules 300 --seed 0
python tests/faults/pool_simulated.py --schedules 150 --seed 0 --ranks    # of `ranks_schedules`
"""

import argparse
import contextlib
import signal
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support")]

import torch  # noqa: E402
from pool_harness import PROMPTS, TOKENS, Pace, PoolHarness  # noqa: E402
from pool_schedules import PoolFault, PoolSchedule, pool_schedule  # noqa: E402
from ranks_harness import RanksHarness  # noqa: E402
from ranks_schedules import ranks_schedule  # noqa: E402
from simulated_servers import SimulatedAdapter, SimulatedClient, SimulatedServer  # noqa: E402

from r3.pool import EnginePool, PoolLimits  # noqa: E402
from r3.weight_sync import WeightSync  # noqa: E402

FAST = Pace(
    timeout_s=1.5,
    short_s=0.2,
    long_s=3.5,
    push_limit_s=12.0,
    limits=PoolLimits(max_in_flight=1, max_attempts=4, health_every_s=0.1, health_timeout_s=0.5, request_timeout_s=3.0),
)
SECONDS = 1e-3  # of a token


class SimulatedHarness(PoolHarness):
    """Servers hold a number, and sample it: 1, 2 or 3 for the weights A, B and C."""

    exact = True

    def __init__(self) -> None:
        super().__init__(FAST)

    def __enter__(self) -> "SimulatedHarness":
        self.servers = [SimulatedServer(name) for name in "xyz"]
        self._known = {name: [[number] * TOKENS] * PROMPTS for number, name in enumerate("ABC", 1)}
        return self

    def _pool(self, servers: list[SimulatedServer], **settings: str) -> EnginePool:
        adapters = [SimulatedAdapter(server) for server in servers]
        settings["transport"] = "files"
        sync = WeightSync(adapters, timeout_s=self.pace.timeout_s, **settings)
        return EnginePool(sync, self.pace.limits, client=lambda adapter: SimulatedClient(adapter.server, SECONDS))

    def _weights(self, name: str) -> list:
        return [("number", torch.tensor([float("ABC".index(name) + 1)]))]

    def _signal(self, server: SimulatedServer, fault: PoolFault, number: int) -> None:
        server.signal(number, core=not fault.whole)

    def _joining(self, server: SimulatedServer) -> SimulatedAdapter:
        return SimulatedAdapter(server)


def simulated(seed: int) -> PoolSchedule:
    return replace(pool_schedule(seed), transport="files")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks", action="store_true", help="two trainer ranks that sync together, and engines by HTTP"
    )
    parser.add_argument("--only", type=int, nargs="+")
    parser.add_argument("--all", action="store_true", help="print also those without a violation")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started here ends with it
    made, schedule_of = (RanksHarness, ranks_schedule) if options.ranks else (SimulatedHarness, simulated)
    with made() as harness, contextlib.suppress(KeyboardInterrupt):
        for seed in options.only or range(options.seed, options.seed + options.schedules):
            if options.ranks and not harness.can_run(schedule_of(seed)):
                continue
            outcome = harness.run(schedule_of(seed))
            if outcome.violations or options.all or options.only:
                print(f"{schedule_of(seed)}\n    -> {outcome}", flush=True)
    print(harness.table())
    return 1 if harness.violations else 0


if __name__ == "__main__":
    sys.exit(main())
