"""What the tests of the pool with real engines share."""

import pytest
from places import DEMO_MODEL


@pytest.fixture(scope="session")
def spec():
    """Of the demo's model."""
    import torch
    from transformers import AutoModelForCausalLM

    import r3

    return r3.attach(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()).spec
