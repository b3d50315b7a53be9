"""A model that transformers spread over ranks = one process, on log-probabilities, loss, gradients and chosen ids."""

import contextlib
import functools

import expert_parallel_jobs as jobs
import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="module")
def two():
    with contextlib.closing(Ranks(2)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with contextlib.closing(Ranks(4)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folders():
    with contextlib.closing(jobs.Folders()) as folders:
        yield folders


@functools.cache
def reference(folder, replayed):
    return jobs.reference(folder, replayed=replayed)


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def check(found, folder, replayed=True):
    expected = reference(folder, replayed)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected["grads"].values())
    assert found["grads"].keys() == expected["grads"].keys()
    worst = {name: gap(found["grads"][name], gradient) for name, gradient in expected["grads"].items()}
    worst["logprobs"] = gap(found["logprobs"], expected["logprobs"])
    worst["loss"] = abs(found["loss"] - expected["loss"]) / float(expected["logprobs"].abs().max())
    assert not {name: value for name, value in worst.items() if not value < 2e-5}


TENSOR = dict(tp_size=2)
BOTH = dict(tp_size=2, ep_size=2)  # transformers chooses all-to-all in training, all-reduce without gradients
EXPERT = dict(fsdp_size=2, ep_size=2)
SLICED = dict(sequence=2)
ON_TWO = {
    "tensor": (TENSOR, {}),
    "tensor and expert": (BOTH, {}),
    "tensor and expert, packed, fused head": (BOTH, dict(packed=True, fused=True)),
    "expert": (EXPERT, {}),
    "expert, padded, fused head": (EXPERT, dict(fused=True)),
    "expert, slices": (EXPERT, SLICED),
    "expert, slices, fused head": (EXPERT, SLICED | dict(fused=True)),
}
ON_FOUR = {
    "tensor and expert": (dict(tp_size=4, ep_size=4), {}),
    "expert": (dict(fsdp_size=4, ep_size=4), {}),
    "fsdp2 x expert": (dict(fsdp_size=4, ep_size=2), {}),
    "fsdp2 x tensor and expert": (dict(fsdp_size=2, tp_size=2, ep_size=2), {}),
    "experts over more ranks than tensors": (dict(fsdp_size=2, tp_size=2, ep_size=4), {}),
    "fsdp2 x expert, slices": (dict(fsdp_size=4, ep_size=2), SLICED | dict(fused=True)),
    "expert, slices over two": (dict(fsdp_size=4, ep_size=4), SLICED),
    "expert, slices over four": (dict(fsdp_size=4, ep_size=4), dict(sequence=4)),
}
families = pytest.mark.parametrize("family", list(jobs.FAMILIES))
checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
replaying = pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "live"])


@families
@checkpointing
@replaying
@pytest.mark.parametrize("how", list(ON_TWO))
def test_two_ranks(two, folders, family, checkpointing, replayed, how):
    layout, options = ON_TWO[how]
    found = two.all(call, folders.of(family), layout, options | dict(checkpointing=checkpointing, replayed=replayed))
    check(found[0], folders.of(family), replayed)


@families
@checkpointing
@pytest.mark.parametrize("how", list(ON_FOUR))
def test_four_ranks(four, folders, family, checkpointing, how):
    layout, options = ON_FOUR[how]
    check(
        four.all(call, folders.of(family), layout, options | dict(checkpointing=checkpointing))[0], folders.of(family)
    )


def call(folder, layout, options):
    """Runs on each rank."""
    return jobs.step(folder, layout, **options)
