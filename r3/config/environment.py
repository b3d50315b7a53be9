"""The only reader of the environment."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for what is made in this context, for libraries that read theirs nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def set_variables(values: Mapping[str, str]) -> None:
    """Environment variables of this process and those that it starts from now on."""
    os.environ.update(values)


def variables(names: Sequence[str]) -> dict[str, str]:
    """Those of these environment variables that are set, with their values."""
    return {name: os.environ[name] for name in names if name in os.environ}


def local_rank() -> int:
    """Place of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_rank() -> tuple[int, int]:
    """(rank, world size) that torchrun or accelerate launch gave this process; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
