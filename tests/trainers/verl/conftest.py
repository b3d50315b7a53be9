"""verl without a GPU: a platform of the tests, registered as verl's plugins are, and r3's plugin after it."""

import importlib.metadata
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if not list(importlib.metadata.distributions(name="verl")):  # as a module, examples/trainers/verl would be found
    collect_ignore_glob = ["test_*.py"]  # `make test-verl`
else:
    # Before verl is imported, here and in the processes that tests start.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    os.environ |= {"VERL_PLATFORM": "r3cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform,trainer_hooks.verl"}


@pytest.fixture(scope="session")
def one_rank():
    """A process group of this process alone."""
    import torch.distributed as dist

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks():
    from ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()
