"""Adapter for a `vllm.LLM` that an external launcher started: its engine core is in the trainer's process."""

from collections.abc import Sequence
from typing import Any

from r3.weight_sync.engines.engine import Reply
from r3.weight_sync.engines.offline_llm import OfflineEngine


class LaunchedEngine(OfflineEngine):
    """This rank's `vllm.LLM` with `distributed_executor_backend="external_launcher"`.

    It reaches its own worker alone, also where several ranks make up one tensor-parallel engine: each rank syncs its
    own, at the same time, and they agree before the commit (`trainer_hooks.push_from_all_ranks`).
    """

    remedy = "Each rank syncs its own vllm.LLM"

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        self.in_this_process = True  # its worker of this rank; those of other ranks are the other ranks'
        self.name = f"vllm.LLM of rank {self._parallel.rank}"

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        # vLLM counts the launcher's ranks, of which this adapter has one.
        alone = {"rank": 0, "world_size": 1, "dp_rank": 0, "dp_size": 1}
        return [reply | alone for reply in super().replies(method, args, timeout_s)]

    def _has_unfinished_requests(self) -> bool:
        # `LLMEngine.has_unfinished_requests` asks all data-parallel ranks: a rank that has failed does not answer.
        return self.llm.llm_engine.output_processor.has_unfinished_requests()

    @property
    def _parallel(self) -> Any:
        return self.llm.llm_engine.vllm_config.parallel_config


def is_launched(llm: Any) -> bool:
    """Whether an external launcher started this `vllm.LLM`: one on each rank."""
    return llm.llm_engine.vllm_config.parallel_config.distributed_executor_backend == "external_launcher"
