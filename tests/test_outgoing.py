"""What of the weights is sent from where it lies, and what is made for a sync."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_moe
from peft import LoraConfig, get_peft_model

from r3.weight_sync.outgoing import Outgoing
from r3.weight_sync.source import named_weights
from r3.weight_sync.transports import IpcTransport


@pytest.mark.parametrize("fused_experts", [False, True])
def test_what_is_sent_from_where_it_lies_is_known(fused_experts):
    """Its memory can be kept open, and its digest taken early; what is made for a sync is let go of after it."""
    model = tiny_moe(dtype=torch.bfloat16)
    named = named_weights(model, fused_experts=fused_experts)
    assert Outgoing(named, dtype=None, chunk_bytes=1).lasting == dict(named).keys()
    assert Outgoing(named, dtype=torch.bfloat16, chunk_bytes=1).lasting == dict(named).keys()
    assert Outgoing(named, dtype=torch.float16, chunk_bytes=1).lasting == set()
    merged = named_weights(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), fused_experts=fused_experts)
    assert {name for name, source in merged if not source.live} == {n for n, _ in named if "q_proj" in n}
    tensors = {"whole": torch.ones(4, 4), "turned": torch.ones(4, 6).T}
    assert Outgoing(tensors.items(), dtype=None, chunk_bytes=1).lasting == {"whole"}


def test_by_ipc_only_what_lies_on_a_gpu_and_stays_there_takes_no_memory():
    transport = IpcTransport()
    transport.lasting = {"kept"}
    here, there = torch.ones(2), SimpleNamespace(is_cuda=True)
    chunks = {"there": [("kept", there)], "here": [("kept", here)], "made": [("kept", there), ("made", there)]}
    assert [name for name, chunk in chunks.items() if transport.takes_memory(chunk)] == ["here", "made"]


def test_what_lies_in_main_memory_is_not_looked_through_for_what_lies_on_a_gpu():
    looked = []

    class Weight(torch.Tensor):
        def detach(self):
            looked.append(1)
            return super().detach()

    named = [(str(n), torch.ones(2).as_subclass(Weight)) for n in range(100)]
    assert list(Outgoing(named, dtype=None, chunk_bytes=1).as_they_lie()) == []
    assert len(looked) == 1
