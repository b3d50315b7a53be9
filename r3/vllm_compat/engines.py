"""What differs between releases of vLLM in its engines and their workers."""

from collections.abc import Callable
from typing import Any

import torch


def version_setter(engine: Any) -> Callable[[str], Any] | None:
    """What sets the weight version that an `LLM` or `AsyncLLM` shows; None up to 0.26, which shows none."""
    return getattr(engine, "update_weight_version", None)


def drafting_model(runner: Any) -> Any:
    """The draft model of a model runner, or None: vLLM's first runner calls what drafts `drafter`, its second one
    `speculator`."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    return getattr(drafter, "model", None)


def allow_amx() -> None:
    """Have torch ask the kernel for AMX, in every worker before its first token.

    The attention of vLLM's CPU build (0.30) uses AMX where there is one, and never asks: the worker dies of SIGILL.
    """
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()
