"""An engine in the trainer's own process: what it cannot do is refused, and it leaves the trainer's state alone.

A whole run with such an engine is in tests/engine/test_processes.py.
"""

import sys
import types

import pytest
import torch

from r3 import ConfigError, R3Config
from trainer_hooks import engines
from trainer_hooks.random_states import kept_random_states

ENGINE = "generator.inference_engine"
IN_PROCESS = f"{ENGINE}.weight_sync.transport=in_process"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (f"{ENGINE}.num_engines=2", "expected num_engines, tensor_parallel_size"),
        (f"{ENGINE}.tensor_parallel_size=2", "expected num_engines, tensor_parallel_size"),
        (f"{ENGINE}.addresses=[http://127.0.0.1:8000]", "expected num_engines, tensor_parallel_size"),
        ("trainer.max_staleness=1", "expected trainer.max_staleness=0, got 1"),
    ],
)
def test_what_one_process_cannot_do_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        R3Config.from_overrides([IN_PROCESS, more])
    R3Config.from_overrides([f"{ENGINE}.weight_sync.transport=gloo", more])


def test_several_trainer_ranks_are_refused():
    R3Config.from_overrides([IN_PROCESS]).check(ranks=1)
    with pytest.raises(ConfigError, match=r"in_process: expected one rank, .* got 2"):
        R3Config.from_overrides([IN_PROCESS]).check(ranks=2)


class SeedsThisProcess:
    """Samples as an engine core does: with the global random numbers of the process that it is in."""

    def __init__(self):
        self.sampled = []

    def collective_rpc(self, method, args):
        torch.manual_seed(*args)

    def generate(self, inputs, sampling, use_tqdm):
        self.sampled.append(torch.rand(4))
        return []


def test_rollouts_leave_the_trainers_random_numbers_as_they_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=dict))
    monkeypatch.setattr(engines, "collect", lambda *args, **kwargs: None)
    config = R3Config.from_overrides([IN_PROCESS])
    engine = SeedsThisProcess()
    with kept_random_states():
        torch.manual_seed(3)
        expected = torch.rand(8)
        torch.manual_seed(3)
        found = []
        for step in (1, 1):
            found.append(torch.rand(4))
            engines.sample(config, engine, [], None, sampling={}, version=0, step=step)
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(*engine.sampled), "what a step samples depends on the step alone"
