"""What of the weights is sent from where it lies, and what is made for a sync."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_moe
from peft import LoraConfig, get_peft_model

from r3.weight_sync.sender.chunking import OutgoingWeights, gather_all
from r3.weight_sync.transports import IpcTransport, ipc
from r3.weight_sync.weights.named import LazyWeight, named_weights


@pytest.mark.parametrize("fused_experts", [False, True])
def test_what_is_sent_from_where_it_lies_is_known(fused_experts):
    """Its memory can be kept open, and its digest taken early; what is made for a sync is let go of after it."""
    model = tiny_moe(dtype=torch.bfloat16)
    named = named_weights(model, fused_experts=fused_experts)
    assert OutgoingWeights(named, dtype=None, chunk_bytes=1).zero_copy_names == dict(named).keys()
    assert OutgoingWeights(named, dtype=torch.bfloat16, chunk_bytes=1).zero_copy_names == dict(named).keys()
    assert OutgoingWeights(named, dtype=torch.float16, chunk_bytes=1).zero_copy_names == set()
    merged = named_weights(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), fused_experts=fused_experts)
    assert {name for name, source in merged if not source.live} == {n for n, _ in named if "q_proj" in n}
    tensors = {"whole": torch.ones(4, 4), "turned": torch.ones(4, 6).T}
    assert OutgoingWeights(tensors.items(), dtype=None, chunk_bytes=1).zero_copy_names == {"whole"}


def test_by_ipc_only_what_lies_on_the_workers_gpu_and_stays_there_takes_no_memory(monkeypatch):
    """A worker on another GPU fetches what it loads, into memory of its own."""
    monkeypatch.setattr(ipc, "gpu_uuid", str)
    transport = IpcTransport()
    transport.zero_copy_names = {"kept"}
    here, there = torch.ones(2), SimpleNamespace(is_cuda=True, device="cuda:0")
    chunks = {"there": [("kept", there)], "here": [("kept", here)], "made": [("kept", there), ("made", there)]}
    takes = lambda: [name for name, chunk in chunks.items() if transport.takes_memory(chunk)]
    transport.worker_gpus = {"cuda:0"}
    assert takes() == ["here", "made"]
    for elsewhere in ({"cuda:1"}, {"cuda:0", "cuda:1"}, {"cuda:0", None}, set()):
        transport.worker_gpus = elsewhere
        assert takes() == ["there", "here", "made"]


def test_chunks_are_larger_where_they_take_no_memory():
    """Every chunk costs both sides; `chunk_bytes` bounds the memory that one takes."""
    kept = [(f"kept {n}", torch.zeros(10, dtype=torch.float32)) for n in range(20)]
    cast = [(f"cast {n}", torch.zeros(10, dtype=torch.float16)) for n in range(4)]
    free = lambda chunk: any(name.startswith("cast") for name, _ in chunk)

    def sizes(named, takes_memory):
        outgoing = OutgoingWeights(named, dtype=torch.float32, chunk_bytes=80)
        return [len(chunk) for _, chunk in outgoing.rounds(takes_memory)]

    assert sizes(kept, lambda chunk: True) == [2] * 10
    assert sizes(kept, free) == [16, 4]
    assert sizes(cast, free) == [2, 2]
    assert sizes([*kept[:8], *cast], free) == [9, 2, 1], "together, no more than either"


def test_what_lies_in_main_memory_is_not_looked_through_for_what_lies_on_a_gpu():
    looked = []

    class Weight(torch.Tensor):
        def detach(self):
            looked.append(1)
            return super().detach()

    named = [(str(n), torch.ones(2).as_subclass(Weight)) for n in range(100)]
    assert list(OutgoingWeights(named, dtype=None, chunk_bytes=1).gpu_resident()) == []
    assert len(looked) == 1


def test_what_is_frozen_is_neither_sent_nor_gathered_on_any_rank():
    """Or ranks that gather in step would wait for each other."""
    gathered: list[str] = []

    def weight(name: str) -> LazyWeight:
        def make() -> torch.Tensor:
            gathered.append(name)
            return torch.ones(2)

        return LazyWeight(name=name, shape=torch.Size([2]), dtype=torch.float32, make=make)

    named = [(name, weight(name)) for name in ("lm_head", "model.visual.a", "model.visual_too.b", "model.c")]
    frozen = ["model.visual.", "lm_head"]
    outgoing = OutgoingWeights(named, dtype=None, chunk_bytes=1, frozen=frozen)
    sent = [name for _, chunk in outgoing.rounds(lambda chunk: True) for name, _ in chunk]
    assert sent == list(outgoing.manifest()) == gathered == ["model.visual_too.b", "model.c"]
    gathered.clear()
    gather_all(named, frozen=frozen)
    assert gathered == sent
