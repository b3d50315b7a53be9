"""The worker extension of the tests of load plans."""

from plan_toys import synced
from safetensors.torch import load_file


class PlanWorker:
    """A worker extension that syncs from a file, with or without what it has learned."""

    def r3_plan_sync(self, path: str, use: bool) -> dict:
        plan = self.__dict__.get("r3_learned") if use else None
        made = synced(self.model_runner.model, self.vllm_config, load_file(path), plan, chunk=50)  # type: ignore[attr-defined]
        self.__dict__["r3_learned"] = made.learned
        return made.learned.describe() | {"again": made.learned is plan, "slow": made.learned.slow}
