"""A port of its own for each test process, and one engine for all trainers of it."""

import os

import pytest
from ports import free_port

# The engine's and the trainer's process group take these; by default all test processes would share a port.
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.fixture(scope="session")
def one_engine():
    """Trainers share an engine, which has its memory once. Every trainer syncs before it samples.

    Gives the arguments with which each trainer asked for it.
    """
    import trl.generation.vllm_generation as generation

    real, made, asked = generation.LLM, [], []

    def shared(**kwargs):
        asked.append(kwargs)
        if not made:
            made.append(real(**{**kwargs, "max_logprobs": 64}))  # enough for all
        vars(made[0]).pop("generate", None)  # what the trainer before put around it
        return made[0]

    generation.LLM = shared
    yield asked
    generation.LLM = real
