"""swift's GRPO pipeline with r3's trainer and a stand-in for the engine: each forward is replayed as it should."""

import pytest
import torch
from conformance import EQUAL
from swift_runs import run


def checked(made):
    """Every forward of the policy in training is the plain replayed one, and far from a live one."""
    scored = [each for each in made.scored if each["training"] and not each["reference"]]
    assert any(each["in_loss"] for each in scored)
    assert max(each["replayed"] for each in scored) < EQUAL
    assert min(each["live"] for each in scored) > 100 * EQUAL
    return scored


@pytest.mark.parametrize("padding_free", [False, True])
def test_replays(tmp_path, padding_free):
    made = run(tmp_path, padding_free=padding_free)
    assert made.template.padding_free == padding_free
    checked(made)
