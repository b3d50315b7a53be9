"""Refuses batches while weights are half-loaded or untrusted: the last line of defence, below every engine's pause."""

from collections.abc import Callable
from typing import Any

from r3.errors import SyncError


class BatchGuard:
    """Replaces `execute_model` of vLLM's model runner.

    A request that gets there during a sync, past the pause of the engine, would be answered from half-loaded weights.
    The engine ends instead, as vLLM has it for whatever `execute_model` raises.

    Args:
        runner: vLLM's model runner, whose `execute_model` this is from now on.
        why_not: returns why no batch may run now; empty if one may.
    """

    def __init__(self, runner: Any, why_not: Callable[[], str]) -> None:
        self._execute = runner.execute_model
        self._why_not = why_not
        runner.execute_model = self

    def __call__(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # A paused engine may still run empty batches.
        if scheduler_output.total_num_scheduled_tokens and (why := self._why_not()):
            raise SyncError(f"a batch came while the weights cannot be trusted: {why}")
        return self._execute(scheduler_output, *args, **kwargs)
