"""Random numbers: this process's (Python's, NumPy's and torch's, on the CPU and on its GPU), and an engine's."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """As `set_random_states` takes them."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  the state that tasks share unless they make their own
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from `states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Context that leaves all random numbers as they would be without it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def seed_engine(engine: Any, seed: int, step: int) -> None:
    """Let what `engine` samples next depend on `seed` and `step` alone, and not on what it has sampled before.

    So a run that is resumed, or evaluated in between, draws the same numbers as one that is not.

    Args:
        engine: a `vllm.LLM` with r3's worker extension.
        seed: below 2**32.
        step: from 0, below 2**31.
    """
    engine.collective_rpc("r3_seed", args=(seed << 31 | step,))
