"""The worker's side of a sync, called as a sender calls it, with small models and no engine."""

from types import SimpleNamespace

import pytest
import torch
from plan_toys import Fused, Toy, assert_same, derive, initial, manifest_of, state, weights_of
from torch import nn

import r3
from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.transports import RECEIVERS, Receiver
from r3.weight_sync.worker import WeightSyncWorker
from r3.weight_sync.worker.reload import LayerwiseReload


class Direct(Receiver):
    """Hands over a sync's tensors, and notes when it is waited for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls: list[str] = []

    def receive(self, where):
        self.calls.append("receive")
        return list(self.offer["weights"].items())

    def wait(self):
        self.calls.append("wait")

    def release(self, index):
        self.calls.append(f"release {index}")


def worker_with(model: nn.Module, vllm_config) -> WeightSyncWorker:
    worker = WeightSyncWorker()
    worker.rank, worker.vllm_config = 0, vllm_config
    run = lambda batch: f"{batch.total_num_scheduled_tokens} tokens"
    worker.model_runner = SimpleNamespace(model=model, device=torch.device("cpu"), execute_model=run, kv_caches=[])
    return worker


def replies_up_to_begin(
    worker: WeightSyncWorker,
    weights: dict[str, torch.Tensor],
    version: int = 1,
    frozen: list[str] | None = None,
    **changes,
) -> list[dict]:
    sync_id = f"sync {version}"
    sync = {
        "timeout_s": 60.0,
        "offer": {"transport": "direct", "weights": weights},
        "ranks": {worker.r3_status()["worker"]: 0},
        "manifest": manifest_of(weights),
        "frozen": frozen or [],
        "keep_base": False,
        "base_version": None,
        "load_plan": True,
        "constants": [],
        **changes,
    }
    return [worker.r3_reserve(sync_id, version, "a test", 60.0), worker.r3_begin(sync_id, sync)]


def replies_of_a_sync(
    worker: WeightSyncWorker,
    weights: dict[str, torch.Tensor],
    version: int = 1,
    frozen: list[str] | None = None,
    **changes,
) -> list[dict]:
    sync_id = f"sync {version}"
    digests = ContentDigests()
    digests.add(weights.items())
    return [
        *replies_up_to_begin(worker, weights, version, frozen, **changes),
        worker.r3_load(sync_id, 0, [(list(weights), {})]),
        worker.r3_seal(sync_id, digests.result()),
        worker.r3_commit(sync_id),
        worker.r3_release(sync_id),
    ]


def calls_of_a_sync(worker: WeightSyncWorker, version: int, **changes) -> list[str]:
    replies = replies_of_a_sync(worker, weights_of(version), version, **changes)
    assert not any("error" in reply for reply in replies), replies
    return [call for call in worker.__dict__["r3_state"].receiver.calls if not call.startswith("release")]


def test_weights_that_sleep_are_refused_and_a_kv_cache_that_sleeps_is_left_alone(vllm_config, monkeypatch):
    """With the state that sleep mode of vLLM keeps on a GPU: there, to write to memory that sleeps ends the process."""
    from vllm.device_allocator.cumem import AllocationData, CuMemAllocator

    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    cache = torch.ones(4)
    worker.model_runner.kv_caches = [cache]
    blocks = {tag: AllocationData((0, 0, 0, 0), tag, is_asleep=True) for tag in ("weights", "kv_cache")}
    allocator = object.__new__(CuMemAllocator)
    allocator.pointer_to_data = dict(enumerate(blocks.values()))
    monkeypatch.setattr(CuMemAllocator, "instance", allocator)
    replies = replies_of_a_sync(worker, weights_of(1), 1)  # what sleeps is of another engine in this process
    assert not any("error" in reply for reply in replies), replies
    monkeypatch.setattr(vllm_config.model_config, "enable_sleep_mode", True)
    _, begun = replies_up_to_begin(worker, weights_of(2), 2)
    assert "weights are asleep" in begun["error"]
    assert 'llm.wake_up(tags=["weights"])' in begun["error"]
    worker.r3_abort("sync 2", "refused")
    assert worker.r3_status()["state"] == "idle"
    blocks["weights"].is_asleep = False
    for version, kept in ((3, 1.0), (4, 0.0)):  # both heal a worker that a failed sync has poisoned
        worker.__dict__["r3_state"].cause = "a sync failed"
        replies = replies_of_a_sync(worker, weights_of(version), version)
        assert not any("error" in reply for reply in replies), replies
        assert cache.eq(kept).all()
        blocks["kv_cache"].is_asleep = False


@pytest.mark.parametrize(
    ("process", "second"),
    [(None, ["receive"]), (derive, ["receive", "wait"])],
)
def test_what_is_queued_on_a_device_is_waited_for_before_anything_but_copies(vllm_config, monkeypatch, process, second):
    """Nothing comes of a broadcast whose sender has died: what waits for the device itself would wait for ever."""
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(process), weights_of(0)), vllm_config)
    finish = LayerwiseReload.finish

    def noted(reload):
        worker.__dict__["r3_state"].receiver.calls.append("finish")
        finish(reload)

    monkeypatch.setattr(LayerwiseReload, "finish", noted)
    end = ["wait", "finish", "wait"]
    found = [calls_of_a_sync(worker, version) for version in (1, 2)]
    assert found == [["receive", "wait", *end], second + end]
    assert_same(state(worker.model_runner.model), state(initial(Toy(process), weights_of(2))))


def test_a_sync_without_load_plans_goes_through_the_loaders(vllm_config, monkeypatch):
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    calls = [calls_of_a_sync(worker, number, load_plan=number != 3) for number in (1, 2, 3, 4)]
    copied = ["receive", "wait", "wait"]
    loaded = ["receive", "wait", "wait", "wait"]  # vLLM's loaders may wait for the device
    assert calls == [loaded, copied, loaded, copied]
    assert_same(state(worker.model_runner.model), state(initial(Toy(), weights_of(4))))


@pytest.mark.parametrize("takes_memory", [True, False])
def test_a_call_waits_for_the_copies_of_the_call_before(vllm_config, monkeypatch, takes_memory):
    """Or the sender would release chunks that are still read; where they take memory here, before the last chunk."""

    class OneByOne(Direct):
        def receive(self, where):
            self.calls.append(where["name"])
            return [(where["name"], self.offer["weights"][where["name"]])]

    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": OneByOne})
    monkeypatch.setattr(OneByOne, "takes_memory", takes_memory)
    weights = weights_of(1)
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    assert not any("error" in reply for reply in replies_up_to_begin(worker, weights))
    state = worker.__dict__["r3_state"]
    names = list(weights)

    def load(index: int, some: list[str]) -> None:
        reply = worker.r3_load("sync 1", index, [([name], {"name": name}) for name in some])
        assert "error" not in reply

    load(0, names[:1])

    class Copies:  # stands for a CUDA event
        left = 3

        def query(self):
            self.left -= 1
            state.receiver.calls.append("copying" if self.left else "copied")
            return not self.left

    state.receiver.calls.clear()
    state.sync.loaded = Copies()
    load(1, names[1:4])
    calls = [call for call in state.receiver.calls if call != "wait"]
    waits = ["copying", "copying", "copied"]
    loads = [*names[1:3], *waits, names[3]] if takes_memory else [*names[1:4], *waits]
    assert calls == [*loads, "release 1"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mlp.experts.gate_up_proj", True),
        ("mlp.experts.0.gate_proj.weight", False),
        ("other.experts.gate_up_proj", False),  # the layer that is missing was not sent at all
    ],
)
def test_a_model_that_passes_over_fused_experts_is_told_how_to_send_them(vllm_config, monkeypatch, name, remedy):
    """As vLLM's Qwen3-MoE does before 0.25, without a word."""
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": Fused()})

        def load_weights(self, weights):
            for _ in weights:
                pass

    worker = worker_with(initial(Old(), {}), vllm_config)
    begin = replies_up_to_begin(worker, {name: torch.ones(2, 8, 8)})[1]
    assert "experts (Fused): 0 of 72 elements" in begin["error"]
    assert ("weight_sync.fused_experts=false" in begin["error"]) == remedy


def test_a_reserve_that_comes_after_its_abort_does_not_keep_the_worker(vllm_config):
    """The calls of a sender that is interrupted may cross; the worker would be nobody's until the lease is over."""
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    assert worker.r3_abort("sync 1", "interrupted")["state"] == "idle"
    late = worker.r3_reserve("sync 1", 1, "a test", 60.0)
    assert "was given up before" in late["error"]
    assert late["state"] == "idle"
    assert worker.r3_reserve("sync 2", 2, "a test", 60.0)["state"] == "reserved"


def test_no_batch_runs_on_weights_that_are_half_loaded_or_cannot_be_trusted(vllm_config, monkeypatch):
    """Below every pause of the engine: whoever resumes it meanwhile gets no token of these weights."""
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    served = []

    def watched(method):
        call = getattr(worker, method)

        def after(*args):
            reply = call(*args)
            try:
                served.append(worker.model_runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=3)))
            except r3.SyncError as error:
                served.append(str(error).partition(" is ")[2] or str(error).partition(": ")[2])
            assert worker.model_runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=0)) == "0 tokens"
            return reply

        return after

    for method in ("r3_reserve", "r3_begin", "r3_load", "r3_seal", "r3_commit", "r3_release"):
        monkeypatch.setattr(worker, method, watched(method))
    whole = ["3 tokens", "open", "open", "sealed", "3 tokens", "3 tokens"]
    for version in (1, 2):  # by vLLM's loaders, and by the plan
        replies_of_a_sync(worker, weights_of(version), version)
        assert served == whole
        served.clear()
    # What comes is not what was announced: the seal fails.
    nan = {name: tensor / 0 for name, tensor in weights_of(3).items()}
    replies_of_a_sync(worker, nan, 3)
    assert served[:3] == whole[:3]
    assert all("NaN" in said for said in served[3:]), served
    served.clear()
    replies_of_a_sync(worker, weights_of(4), 4)
    assert "NaN" in served[0]
    assert served[1:] == whole[1:]


def errors_of(replies: list[dict]) -> list[str]:
    return [reply["error"] for reply in replies if "error" in reply]


@pytest.mark.parametrize("process", [None, derive], ids=["planned", "slow"])
def test_frozen_layers_keep_what_they_have_and_all_else_must_come(vllm_config, monkeypatch, process):
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(process), weights_of(0)), vllm_config)
    two = lambda seed: weights_of(seed, layers=("two",))
    for version in (1, 2):  # by vLLM's loaders, and by what was learned
        replies = replies_of_a_sync(worker, two(version), version, ["one"])
        assert not errors_of(replies)
        assert replies[1]["kept"] == {"one": ["one"]}
        expected = initial(Toy(process), weights_of(0) | two(version))
        assert_same(state(worker.model_runner.model), state(expected))
    # The same tensors, and nobody says that the rest is left out: what was learned of them does not hide it.
    [said, *_] = errors_of(replies_of_a_sync(worker, two(3), 3))
    assert "one (Fused): 0 of 72 elements" in said
    assert worker.r3_abort("sync 3", "refused")["state"] == "idle"
    # A complete sync makes a plan; with that, too, a part can be left out.
    for version, frozen in ((4, []), (5, []), (6, ["one"])):
        weights = two(version) if frozen else weights_of(version)
        assert not errors_of(replies_of_a_sync(worker, weights, version, frozen))
    assert_same(state(worker.model_runner.model), state(initial(Toy(process), weights_of(5) | two(6))))
    part = {name: tensor for name, tensor in two(7).items() if name != "two.up"}
    [said, *_] = errors_of(replies_of_a_sync(worker, part, 7, ["one"]))
    assert "two (Fused): 40 of 72 elements" in said


def test_what_is_frozen_and_sent_is_refused_untouched(vllm_config, monkeypatch):
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    reply = replies_up_to_begin(worker, weights_of(1), 1, ["one"])[1]
    assert "frozen=['one'], and yet sent:\n  one.gate" in reply["error"]
    assert worker.r3_abort("sync 1", "refused")["state"] == "idle"


def test_what_a_failed_sync_may_have_touched_cannot_be_kept(vllm_config, monkeypatch):
    monkeypatch.setattr("r3.weight_sync.worker.extension.RECEIVERS", RECEIVERS | {"direct": Direct})
    worker = worker_with(initial(Toy(), weights_of(0)), vllm_config)
    two = weights_of(1, layers=("two",))
    broken = {name: tensor / 0 for name, tensor in two.items()}
    assert errors_of(replies_of_a_sync(worker, broken, 1, ["one"]))
    assert not errors_of(replies_of_a_sync(worker, two, 2, ["one"]))  # that one has not touched it
    assert errors_of(replies_of_a_sync(worker, broken, 3, ["one"]))
    assert errors_of(replies_of_a_sync(worker, {n: t / 0 for n, t in weights_of(1).items()}, 4))
    reply = replies_up_to_begin(worker, two, 5, ["one"])[1]
    assert "may be half-loaded" in reply["error"]
    assert "push once without frozen=['one']" in reply["error"]
    worker.r3_abort("sync 5", "refused")
    assert not errors_of(replies_of_a_sync(worker, weights_of(6), 6))
    assert not errors_of(replies_of_a_sync(worker, two, 7, ["one"]))
