"""A port of its own for each test process, and one engine for all trainers of it."""

import os

import pytest
from ports import free_port

# The engine's and the trainer's process group take these; by default all test processes would share a port.
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.fixture(scope="session")
def one_engine():
    """Trainers share an engine, which has its memory once. Every trainer syncs before it samples."""
    import trl.generation.vllm_generation as generation

    real, made = generation.LLM, []

    def shared(**kwargs):
        if not made:
            made.append(real(**kwargs))
        return made[0]

    generation.LLM = shared
    yield
    generation.LLM = real
