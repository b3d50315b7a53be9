"""Replay in models that are wrapped, compiled, copied, on meta, or used from several threads."""

import copy
import threading

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from models import LAYERS, random_ids, tiny_moe, tokens
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM
from zoo import CASES

import r3
from r3.parallel import make_mesh, shard_parameters
from r3.replay import context, patching
from r3.wrappers import is_tuner


def forward(model, **kwargs):
    return model(input_ids=tokens(), use_cache=False, **kwargs).logits


@pytest.fixture(scope="module")
def expected():
    """Logits of the plain model: live, and replaying `random_ids(seed)`."""
    model = tiny_moe()
    r3.attach(model)
    with torch.no_grad():
        return {"live": forward(model)} | {
            seed: forward(model, routed_experts=random_ids(seed=seed)) for seed in range(4)
        }


def wrap_lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))


def wrap_lora_on_router(model):
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"], r=4)
    return peft.get_peft_model(model, config)


def wrap_trained_router(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], r=4))


def wrap_compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "lora": wrap_lora,
    "lora_on_router": wrap_lora_on_router,
    "trained_router": wrap_trained_router,
    "ddp": DistributedDataParallel,
    "compiled": wrap_compiled,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrapper", "first"),
    # PEFT puts another module in the router's place: where it does, it comes first.
    [(name, "wrap") for name in WRAPPERS] + [(name, "attach") for name in ("lora", "ddp", "compiled")],
)
def test_a_wrapped_model_replays_as_the_plain_one(expected, wrapper, first):
    model = tiny_moe()
    replay = r3.attach(model) if first == "attach" else None
    wrapped = WRAPPERS[wrapper](model)
    replay = replay or r3.attach(wrapped)
    for seed in range(2):
        assert torch.equal(forward(wrapped, routed_experts=random_ids(seed=seed)), expected[seed])
    assert replay.last.routers == LAYERS
    assert torch.equal(forward(wrapped), expected["live"])
    assert replay.last is None
    forward(wrapped.train(), routed_experts=random_ids()).square().mean().backward()
    gates = [p.grad for n, p in wrapped.named_parameters() if ".gate." in n and p.grad is not None]
    assert wrapper == "lora" or any(bool((g != 0).any()) for g in gates)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", ["attach", "wrap"])
def test_a_router_that_is_an_fsdp_unit_of_its_own(first):
    """As `shard_parameters` makes one of a router that transformers keeps in float32."""
    case = CASES["ernie4_5_moe"]
    model = case.build()
    replay = r3.attach(model) if first == "attach" else None
    shard_parameters(model, make_mesh("cpu"), param_dtype=torch.bfloat16)
    routers = [router for _, router in case.routers(model)]
    assert all(isinstance(router, FSDPModule) for router in routers)
    replay = replay or r3.attach(model)
    with torch.no_grad(), r3.record(model) as recorder:
        live = model(**case.inputs()).logits
    replayed = model(**case.inputs(), routed_experts=recorder.routing).logits
    assert torch.equal(replayed, live)
    assert replay.last.routers == len(routers)
    replayed.float().square().mean().backward()
    assert all(router.weight.grad.full_tensor().any() for router in routers)
    replay.detach()
    assert torch.equal(model(**case.inputs()).logits, live)


SHARED = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("qwen3_moe", dict(target_modules=["q_proj"]), None),
        ("qwen3_moe", dict(target_modules="all-linear"), "the routers of 2 and the routed experts of 2, of 2 layers"),
        ("deepseek_v3", dict(target_modules=[f"shared_experts.{each}" for each in SHARED]), "the routed experts of 2,"),
        # What the message says to do instead.
        ("deepseek_v3", dict(target_parameters=[f"shared_experts.{each}.weight" for each in SHARED]), None),
    ],
)
def test_adapters_on_what_routing_is_about_are_said(name, settings, said, caplog):
    model = CASES[name].build()
    r3.attach(peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)))
    assert [said in message for message in caplog.messages] == ([] if said is None else [True])
    if name == "deepseek_v3":
        shared = model.model.layers[1].mlp.shared_experts
        assert is_tuner(shared.gate_proj) == (said is None)


def test_a_router_replaced_after_attach_is_found():
    model = tiny_moe()
    r3.attach(model)
    wrapped = wrap_trained_router(model)
    with pytest.raises(r3.ReplayError, match="These did not run"):
        forward(wrapped, routed_experts=random_ids())


def compiled_graphs(model) -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.16"), reason="transformers cannot compile its grouped products"
)
def test_compiled_layers_share_one_graph_and_take_new_ids():
    layers = 10  # more than torch.compile recompiles before it gives up
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_moe(num_hidden_layers=layers)
    model.set_experts_implementation("grouped_mm")
    r3.attach(model)
    routings = [random_ids(layers=layers, seed=seed) for seed in range(2)]
    wanted = [forward(model, routed_experts=routing) for routing in routings]
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for routing, logits in zip(routings, wanted, strict=True):
        torch.testing.assert_close(forward(model, routed_experts=routing), logits, rtol=1e-5, atol=1e-6)
    assert compiled_graphs(model) == 1
    holes = routings[0].index_fill(1, torch.tensor([3]), -1)
    forward(model, routed_experts=holes)
    assert compiled_graphs(model) == 2


def test_what_is_traced_computes_what_eager_code_does(expected, monkeypatch):
    """The code of replay that torch.compile traces, run as it stands: one step after the other can be seen."""
    model = tiny_moe()
    replay = r3.attach(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for seed in range(2):
        assert torch.equal(forward(model, routed_experts=random_ids(seed=seed)), expected[seed])
        assert replay.last.routers == LAYERS
    assert torch.equal(forward(model), expected["live"])


def test_the_call_of_compiled_code_is_found_after_a_graph_break():
    model = tiny_moe()
    patch = r3.attach(model)._patch
    activity, call = patch.activity, object()
    other = context.Activity()
    assert (activity.current, activity.fell_back) == (context.Outside, False)
    with context.Carrier(activity, call), context.Carrier(other, None):
        assert activity.current is call
        assert other.current is None
        assert (activity.fell_back, other.fell_back) == (True, True)
        assert torch.sub(torch.ones(2), torch.ones(2), alpha=3).tolist() == [-2, -2]
        assert torch.ones(2).add(1).tolist() == [2, 2]
    assert activity.current is context.Outside


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_compiled_layers_with_graph_breaks_and_checkpointing(expected, reentrant):
    torch._dynamo.reset()
    model = tiny_moe().train()
    model.set_experts_implementation("grouped_mm")
    r3.attach(model)
    forward(model, routed_experts=random_ids()).square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        layer.compile(backend="eager")
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    loss = forward(model, routed_experts=random_ids()).square().mean()
    forward(model)
    torch.testing.assert_close(forward(model, routed_experts=random_ids(seed=1)), expected[1], rtol=1e-4, atol=1e-5)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_model_on_meta_is_proved_before_it_has_weights(expected):
    source = tiny_moe()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(source.config).eval()
        r3.attach(model)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    model.model.rotary_emb = source.model.rotary_emb  # not in the state dict
    assert torch.equal(forward(model, routed_experts=random_ids()), expected[0])


def test_a_copy_replays_by_itself(expected):
    model = tiny_moe()
    replay = r3.attach(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.gate.weight.add_(1.0)
    assert not torch.equal(forward(twin, routed_experts=random_ids()), expected[0])
    assert torch.equal(forward(model, routed_experts=random_ids()), expected[0])
    replay.detach()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(forward(twin, routed_experts=random_ids()), expected[0])


def test_threads_do_not_see_each_others_routing(expected):
    model = tiny_moe()
    replay = r3.attach(model)
    wrong, finished = [], []

    def work(key):
        with torch.no_grad():
            for _ in range(25):
                kwargs = {} if key == "live" else {"routed_experts": random_ids(seed=key)}
                same = torch.equal(forward(model, **kwargs), expected[key])
                if not same or (replay.last is None) != (key == "live"):
                    wrong.append(key)
        finished.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(finished) == len(expected)


def test_an_attach_that_fails_halfway_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_moe()
    classes = [type(module) for module in model.modules()]
    monkeypatch.setattr(patching, "_patched_router", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        r3.attach(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("_r3" in key for module in model.modules() for key in vars(module))
    monkeypatch.undo()
    r3.attach(model).detach()


def test_routing_that_goes_past_the_attached_module_is_refused():
    model = tiny_moe()
    wrapped = wrap_lora(model)
    r3.attach(wrapped)
    with pytest.raises(r3.ReplayError, match="past the module that replay is attached to"):
        forward(model, routed_experts=random_ids())


def test_recording_beside_replay_and_after_other_forwards():
    model = tiny_moe().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with r3.record(model) as recorder:
        replay = r3.attach(model)
        first = forward(model, routed_experts=random_ids(seed=1)).square().mean()
        forward(model, routed_experts=random_ids(seed=2))
        first.backward()  # repeats the layers of the first forward
        assert torch.equal(recorder.routing.expert_ids.long(), random_ids(seed=2))
        replay.detach()
        live = forward(model)
    replay = r3.attach(model)
    assert torch.equal(forward(model, routed_experts=recorder.routing), live)
