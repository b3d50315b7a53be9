"""Differences between releases of vLLM in its engines and their workers."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import torch


def version_setter(engine: Any) -> Callable[[str], Any] | None:
    """The method that sets the weight version shown by an `LLM` or `AsyncLLM`; None up to 0.26, which shows none."""
    return getattr(engine, "update_weight_version", None)


def rejections() -> tuple[type[Exception], ...]:
    """The errors with which an `AsyncLLM` rejects a request that may be sent again; none up to 0.31.

    From 0.33 `pause_generation` makes the engine reject requests, except in mode "keep".
    """
    error = getattr(sys.modules.get("vllm.exceptions"), "RetryableRequestError", None)
    return () if error is None else (error,)


async def pause_and_queue(engine: Any, mode: str) -> None:
    """Pause an `AsyncLLM` so that its requests queue until it is resumed, as `pause_generation` did up to 0.32."""
    await engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)
    # As `pause_generation` does: the last outputs pass through tasks of this loop before the caller goes on.
    await asyncio.sleep(0.02)


def drafting_model(runner: Any) -> Any:
    """The draft model of a model runner, or None: `drafter` in vLLM's first runner, `speculator` in its second."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    return getattr(drafter, "model", None)


def memory_asleep() -> set[str]:
    """What sleep mode has taken from this process's worker: "weights", "kv_cache". To touch it ends the process.

    Read in vLLM 0.30, whose CPU builds ignore sleep mode; where it keeps no such state, nothing counts as asleep.
    """
    allocator = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    blocks = getattr(getattr(allocator, "instance", None), "pointer_to_data", {})
    return {block.tag for block in blocks.values() if getattr(block, "is_asleep", False)}


def allow_amx() -> None:
    """Let torch request AMX from the kernel, in every worker before its first token.

    The attention of vLLM's CPU build (0.30) uses AMX where the CPU has it, without requesting it: the worker dies of
    SIGILL.
    """
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()
