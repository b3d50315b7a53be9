"""A tiny policy and its rollouts, and two ranks to train it on."""

import pytest
from learning_steps import make_rollouts, save_checkpoint
from ranks import Ranks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch(path):
    return make_rollouts(path)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()
