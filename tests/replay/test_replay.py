"""Replay in a real transformers model: exact, obedient, differentiable, and gone when detached."""

import copy

import pytest
import torch
import torch.distributed as dist
from models import EXPERTS, LAYERS, TOP_K, random_ids, tiny_dense, tiny_moe, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import r3
from r3.replay.discovery import find_routers
from r3.replay.proof import prove


def forward(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_routing_is_bit_identical_to_live(dtype):
    model, ids = tiny_moe(dtype), tokens()
    live = forward(model, ids)
    with r3.record(model) as recorder:
        forward(model, ids)
    r3.attach(model)
    assert torch.equal(forward(model, ids, routed_experts=recorder.routing), live)


def test_foreign_ids_reach_the_experts_as_given_with_weights_from_the_live_logits():
    model, ids, routing = tiny_moe(), tokens(), random_ids()
    r3.attach(model)
    seen = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    logits = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    forward(model, ids, routed_experts=routing)
    for column, ((_, chosen, weights), live) in enumerate(zip(seen, logits, strict=True)):
        expected = routing[:, :, column].flatten(0, 1)
        assert torch.equal(chosen, expected)
        # Qwen3-MoE with norm_topk_prob: a softmax over the chosen experts alone.
        torch.testing.assert_close(weights, live.double().gather(-1, expected).softmax(-1).float())


def test_gradient_of_every_gate_equals_autograd_on_the_formula():
    model, routing = tiny_moe(), random_ids(1, 6)
    r3.attach(model)
    gate = model.model.layers[0].mlp.gate
    hidden, direction = torch.randn(6, 32), torch.randn(6, TOP_K)
    ids = routing[0, :, 0]
    reference = gate.weight.detach().double().requires_grad_()
    ((hidden.double() @ reference.T).gather(-1, ids).softmax(-1) * direction).sum().backward()

    captured = {}
    gate.register_forward_hook(lambda module, args, output: captured.update(weights=output[1]))
    # The first layer's router, fed with inputs of ours in place of the block's.
    gate.register_forward_pre_hook(lambda module, args: (hidden,))
    forward(model, tokens(1, 6), routed_experts=routing)
    (captured["weights"] * direction).sum().backward()
    torch.testing.assert_close(gate.weight.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)
    assert gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_with_other_forwards_in_between(reentrant):
    model, ids, routing = tiny_moe().train(), tokens(), random_ids()
    r3.attach(model)
    forward(model, ids, routed_experts=routing).square().mean().backward()
    expected = gradients(model)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first = forward(model, ids, routed_experts=routing).square().mean()
    forward(model, ids)
    forward(model, ids, routed_experts=random_ids(seed=9))
    first.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[f"model.layers.{i}.mlp.gate.weight"].abs().max() > 0 for i in range(LAYERS))


def test_rows_that_are_not_valid_are_routed_live():
    model, ids, routing = tiny_moe(num_hidden_layers=1), tokens(1, 8), random_ids(1, 8, layers=1)
    replay = r3.attach(model)
    live, replayed = forward(model, ids), forward(model, ids, routed_experts=routing)
    holes = routing.clone()
    holes[0, [2, 5]] = -1
    mixed = forward(model, ids, routed_experts=holes)
    # With one layer a token's routing cannot reach another token.
    wanted = replayed.clone()
    wanted[0, [2, 5]] = live[0, [2, 5]]
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-6)
    assert not torch.equal(live, replayed)
    assert (replay.last.rows_replayed, replay.last.rows_live, replay.last.routers) == (6, 2, 1)


def test_forward_without_routing_is_untouched_and_detach_leaves_no_trace():
    model, ids = tiny_moe(), tokens()
    classes = [type(module) for module in model.modules()]
    live = forward(model, ids)
    replay = r3.attach(model)
    assert torch.equal(forward(model, ids), live)
    assert replay.last is None
    replay.detach()
    replay.detach()
    assert [type(module) for module in model.modules()] == classes
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or vars(m).keys() & {"_r3_patch", "_r3_router"}
        for m in model.modules()
    )
    r3.attach(model).detach()


def test_an_exception_in_a_layer_leaves_nothing_switched_on():
    model, ids = tiny_moe(), tokens()
    live = forward(model, ids)
    r3.attach(model)
    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, ids, routed_experts=random_ids())
    hook.remove()
    assert torch.equal(forward(model, ids), live)
    assert torch.equal(torch.topk(torch.eye(EXPERTS), TOP_K).indices[:, 0], torch.arange(EXPERTS))


def test_one_model_is_attached_once_and_two_models_do_not_mix():
    model, other = tiny_moe(), tiny_moe()
    replay = r3.attach(model)
    with pytest.raises(r3.ReplayError, match="attached to this Qwen3MoeForCausalLM already"):
        r3.attach(model)
    second = r3.attach(other)
    forward(model, tokens(), routed_experts=random_ids())
    assert replay.last is not None
    assert second.last is None


def test_dense_layers_have_no_column_and_a_column_for_every_layer_is_cut_down():
    model, ids = tiny_moe(mlp_only_layers=[0]), tokens()
    replay = r3.attach(model)
    assert replay.spec.layer_ids == (1, 2)
    routing = random_ids()
    routing[:, :, 0] = 0  # as vLLM reports a dense layer
    every = forward(model, ids, routed_experts=routing)
    assert torch.equal(every, forward(model, ids, routed_experts=routing[:, :, 1:]))


def test_a_dense_model_is_refused():
    with pytest.raises(r3.UnsupportedModelError, match="Qwen3ForCausalLM has no router"):
        r3.attach(tiny_dense())


def test_a_decoder_that_runs_its_layers_several_times_is_refused():
    """As Inkling2Loop does from transformers 5.24 on: three layers in three passes, with seven choices a token."""
    looped = tiny_moe()
    looped.config.loop_num_passes = 3
    with pytest.raises(r3.UnsupportedModelError, match=r"runs decoder layers 3 times.*loop_num_passes"):
        r3.attach(looped)
    looped.config.loop_num_passes = 1
    r3.attach(looped)


def test_a_router_that_ignores_the_ids_is_refused_by_name():
    site = find_routers(tiny_moe()).sites[0]
    router = site.router

    class Stubborn(type(router)):
        def forward(self, hidden):
            logits, weights, _ = super().forward(hidden)
            return logits, weights, logits.argsort(-1, descending=True)[:, :TOP_K]

    router.__class__ = Stubborn
    with pytest.raises(r3.UnsupportedModelError, match=r"gate.*Stubborn.*does not return the ids"):
        prove(site)


def test_weights_cut_to_the_live_choice_are_refused():
    site = find_routers(tiny_moe()).sites[0]
    router = site.router

    class Masked(type(router)):
        def forward(self, hidden):
            logits = torch.nn.functional.linear(hidden, self.weight)
            floor = logits.sort(dim=-1, descending=True).values[:, TOP_K - 1 : TOP_K]
            scores = logits.softmax(-1) * (logits >= floor)
            weights, ids = torch.topk(scores, TOP_K, dim=-1)
            return logits, weights, ids

    router.__class__ = Masked
    with pytest.raises(r3.UnsupportedModelError, match="cut to the live top-k"):
        prove(site)


def test_a_bypassed_router_is_found():
    model = tiny_moe()
    r3.attach(model)
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden
    with pytest.raises(r3.ReplayError, match=r"(?s)did not run.*model\.layers\.1\.mlp\.gate"):
        forward(model, tokens(), routed_experts=random_ids())


def test_a_replaced_router_forward_is_found():
    model = tiny_moe()
    r3.attach(model)
    gate = model.model.layers[2].mlp.gate

    def without_topk(hidden):
        logits = torch.nn.functional.linear(hidden, gate.weight)
        weights, ids = logits.softmax(-1).sort(dim=-1, descending=True)
        return logits, weights[:, :TOP_K], ids[:, :TOP_K]

    gate.forward = without_topk
    with pytest.raises(r3.ReplayError, match=r"(?s)did not run.*model\.layers\.2\.mlp\.gate"):
        forward(model, tokens(), routed_experts=random_ids())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:1], r"expected \[B, S, L, K\] = \(2, 10, 3, 2\).*got \(1, 10, 3, 2\)"),
        (lambda r: r[:, :-1], r"got \(2, 9, 3, 2\)"),
        (lambda r: r.transpose(0, 1), r"got \(10, 2, 3, 2\)"),
        (lambda r: r[..., :1], r"got \(2, 10, 3, 1\)"),
        (lambda r: r[:, :, :2], "L = 3 layers"),
        (lambda r: r[0], "L = 3 layers"),
        (lambda r: r.float(), "expected integer"),
        (lambda r: torch.full_like(r, EXPERTS), r"sample 0, position 0, decoder layer 0: \[8, 8\]"),
        (lambda r: r.index_fill(3, torch.tensor([0, 1]), 5), r"decoder layer 2: \[5, 5\]"),
    ],
)
def test_bad_routing_is_refused_with_where_and_what(change, message):
    model = tiny_moe()
    r3.attach(model)
    with pytest.raises(r3.RoutingError, match=message):
        forward(model, tokens(), routed_experts=change(random_ids()))


def test_required_replay_refuses_a_training_forward_without_routing():
    model = tiny_moe()
    r3.attach(model, required=True)
    forward(model, tokens())
    with pytest.raises(r3.ReplayError, match="replay is required"):
        forward(model.train(), tokens())


def shard(model, mesh, **policy):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_fsdp2_gives_the_gradients_of_the_whole_model(one_rank, attach_first, checkpointing):
    model, ids, routing = tiny_moe().train(), tokens(), random_ids()
    whole = copy.deepcopy(model)
    r3.attach(whole)
    forward(whole, ids, routed_experts=routing).square().mean().backward()
    expected = gradients(whole)

    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replay = r3.attach(model, required=True) if attach_first else None
    shard(model, one_rank)
    replay = replay or r3.attach(model, required=True)
    loss = forward(model, ids, routed_experts=routing).square().mean()
    with torch.no_grad():
        model.eval()
        forward(model, ids)
        model.train()
    loss.backward()
    found = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert replay.last is None  # the last forward was live
    del loss
    replay.detach()
    assert torch.equal(forward(model.eval(), ids), forward(tiny_moe().eval(), ids))
    replay = r3.attach(model)
    forward(model, ids, routed_experts=routing)
    assert replay.last.routers == LAYERS
    replay.detach()


@pytest.mark.parametrize("attach_first", [True, False])
def test_fsdp2_mixed_precision_gives_the_logits_of_a_bfloat16_model(one_rank, attach_first):
    model, low, ids, routing = tiny_moe(), tiny_moe(), tokens(), random_ids()
    for parameter in low.parameters():  # not the rotary frequencies, which are a buffer
        parameter.data = parameter.data.bfloat16()
    replay = r3.attach(model) if attach_first else None
    shard(model, one_rank, param_dtype=torch.bfloat16)
    replay = replay or r3.attach(model)
    r3.attach(low)
    wanted = forward(low, ids, routed_experts=routing)
    assert torch.equal(forward(model, ids, routed_experts=routing), wanted)
    assert torch.equal(forward(model, ids, routed_experts=replay.routing(routing)), wanted)
    assert replay.last.routers == LAYERS


def test_recorded_routing_is_what_the_routers_chose():
    model, ids = tiny_moe(), tokens()
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    with r3.record(model) as recorder:
        with pytest.raises(r3.ReplayError, match="nothing recorded"):
            _ = recorder.routing
        forward(model, ids)
    routing = recorder.routing
    assert routing.expert_ids.dtype == torch.uint8
    assert torch.equal(routing.expert_ids.long(), torch.stack(chosen, 1).view(2, 10, LAYERS, TOP_K))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_is_recorded_of_a_replayed_forward_is_what_was_replayed():
    model, routing = tiny_moe(), random_ids()
    r3.attach(model)
    with r3.record(model) as recorder:
        forward(model, tokens(), routed_experts=routing)
    assert torch.equal(recorder.routing.expert_ids.long(), routing)


def test_the_load_balancing_loss_sees_live_assignments():
    model, ids, routing = tiny_moe(output_router_logits=True).train(), tokens(), random_ids()
    r3.attach(model)
    output = model(input_ids=ids, use_cache=False, labels=ids, routed_experts=routing)
    live = load_balancing_loss_func(output.router_logits, EXPERTS, TOP_K)
    assert torch.equal(output.aux_loss, live)
    probabilities = torch.cat(output.router_logits).softmax(-1)
    replayed = torch.nn.functional.one_hot(routing.permute(2, 0, 1, 3).flatten(0, 2), EXPERTS).sum(1).float()
    assert not torch.isclose(live, EXPERTS * (replayed.mean(0) * probabilities.mean(0)).sum(), rtol=1e-3)


def test_a_layer_that_runs_twice_in_a_forward_is_an_error():
    model = tiny_moe()
    r3.attach(model)
    layers = model.model.layers
    layers[1] = layers[0]
    with pytest.raises(r3.ReplayError, match=r"layers\.0\.mlp\.gate was replayed twice in one forward"):
        forward(model, tokens(), routed_experts=random_ids())


class Block(nn.Module):
    """A MoE block as remote code writes it: no class that transformers knows."""

    def __init__(self, choose):
        super().__init__()
        self.gate = Gate(choose)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS))

    def forward(self, hidden):
        weights, ids = self.gate(hidden.view(-1, 16))
        every = torch.stack([expert(hidden.view(-1, 16)) for expert in self.experts], 1)
        chosen = every.gather(1, ids[..., None].expand(-1, -1, 16))
        return hidden + (weights[..., None] * chosen).sum(1).view_as(hidden)


class Gate(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16))
        self.choose = choose

    def forward(self, hidden):
        return self.choose((hidden @ self.weight.T).sigmoid())


class Remote(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Layer(choose) for _ in range(2))

    def forward(self, input_ids, **kwargs):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return hidden


class Layer(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.mlp = Block(choose)

    def forward(self, hidden):
        return self.mlp(hidden)


def normalised_topk(scores):
    values, ids = scores.topk(TOP_K)
    return values / values.sum(-1, keepdim=True), ids


def test_remote_code_passes_on_the_proof_alone():
    torch.manual_seed(0)
    model, ids = Remote(normalised_topk), tokens()
    with r3.record(model) as recorder:
        live = model(ids)
    replay = r3.attach(model)
    assert torch.equal(model(ids, routed_experts=recorder.routing), live)
    assert not torch.equal(model(ids, routed_experts=random_ids(layers=2)), live)
    assert replay.last.routers == 2


def scaled_by_another_topk(scores):
    scale = scores.topk(TOP_K + 1)[0].sum(-1, keepdim=True)
    values, ids = normalised_topk(scores)
    return values * scale, ids


def test_a_top_k_that_is_more_than_a_limit_runs_in_a_replayed_forward():
    torch.manual_seed(0)
    model, ids = Remote(scaled_by_another_topk), tokens()
    with r3.record(model) as recorder:
        live = model(ids)
    r3.attach(model)
    assert torch.equal(model(ids, routed_experts=recorder.routing), live)


def sorted_not_topk(scores):
    values, ids = scores.sort(-1, descending=True)
    return values[:, :TOP_K], ids[:, :TOP_K]


def constant_weights(scores):
    return torch.ones(len(scores), TOP_K), scores.topk(TOP_K)[1]


def chosen_twice(scores):
    return scores.sqrt().topk(TOP_K)[0], scores.topk(TOP_K)[1]


def detached_weights(scores):
    values, ids = scores.topk(TOP_K)
    return values.detach(), ids


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (sorted_not_topk, "saw 0"),
        (constant_weights, "weights do not follow the ids"),
        (chosen_twice, "saw 2"),
        (detached_weights, "no finite gradient reaches the gate"),
    ],
)
def test_remote_code_fails_on_the_proof_alone(choose, message):
    with pytest.raises(r3.UnsupportedModelError, match=rf"layers\.0\.mlp\.gate \(Gate\).*{message}"):
        r3.attach(Remote(choose))
