"""One engine for all trainers of a process."""

import pytest


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
