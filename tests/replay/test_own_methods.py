"""Methods that were set on a module itself: what is found behind them, and what replay moves aside and puts back."""

import functools
import types

import pytest
import torch
from models import LAYERS, TOP_K, random_ids, tiny_moe, tokens
from torch import nn

import r3
from r3.own_methods import ASIDE, BELOW_HOOK, Moved, code_of, on_copy
from r3.replay.patching import _subclass

ROUTE = "route_tokens_to_experts"


class Plain(nn.Module):
    def forward(self, x):
        return x + 1

    def route_tokens_to_experts(self, x):
        return x * 2


def own(self, x):
    return x + 10


def other(self, x):
    return x + 20


class Timer:
    """A wrapper that is an object."""

    def __init__(self, function) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return self.__wrapped__(*args)


class Holder:
    def run(self, function, x):
        return function(x)


def by_default(function):
    def forward(x, plain=function):
        return plain(x)

    return forward


def by_keyword_default(function):
    def forward(x, *, plain=function):
        return plain(x)

    return forward


def by_closure(function):
    def forward(x):
        return function(x)

    return forward


def before_its_helper_is_there(function):
    def forward(x):
        return helper(function(x))

    if function is None:
        helper = abs
    return forward


def that_calls_itself(function):
    def forward(x, again=True):
        return forward(x, again=False) if again else function(x)

    return forward


def beside_a_module(function):
    beside = nn.Linear(1, 1)

    def forward(x):
        return function(x), beside

    return forward


def partial_with_wrapped(function):
    made = functools.partial(lambda x: x)
    made.__wrapped__ = function
    return made


def method_of_another(function):
    return types.MethodType(by_closure(function), Holder())


WRAPPERS = {
    "closure": by_closure,
    "default": by_default,
    "keyword default": by_keyword_default,
    "object": Timer,
    "partial": functools.partial,
    "argument of a partial": lambda function: functools.partial(Holder().run, function),
    "keyword of a partial": lambda function: functools.partial(lambda x, plain: plain(x), plain=function),
    "partial with __wrapped__": partial_with_wrapped,
    "method of another": lambda function: types.MethodType(lambda self, x, plain=function: plain(x), Holder()),
    "closure bound to another": method_of_another,
    "empty cell": before_its_helper_is_there,
    "itself": that_calls_itself,
    "beside a module": beside_a_module,
    "several": lambda function: functools.partial(Timer(by_default(by_closure(function)))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_method_behind_any_wrapper_is_found(name):
    for function in (Plain.forward, own):
        module = Plain()
        vars(module)["forward"] = WRAPPERS[name](types.MethodType(function, module))
        assert code_of(module, "forward") is function
        assert code_of(module, ROUTE) is Plain.route_tokens_to_experts
        assert code_of(Plain(), "forward") is Plain.forward


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_around_nothing_of_the_module_has_no_code(name):
    module, stranger = Plain(), Plain()
    vars(module)["forward"] = WRAPPERS[name](stranger.forward)
    assert code_of(module, "forward") is None


def test_what_is_below_accelerates_hook_counts_for_forward_alone():
    module = Plain()
    vars(module)[BELOW_HOOK] = types.MethodType(own, module)
    vars(module)["forward"] = types.MethodType(other, module)
    assert code_of(module, "forward") is own
    assert code_of(module, ROUTE) is Plain.route_tokens_to_experts
    vars(module)[ROUTE] = types.MethodType(other, module)
    assert code_of(module, ROUTE) is other


def extended_by(method: str) -> type[nn.Module]:
    """A subclass as replay makes it."""

    def replacement(self, x):
        return getattr(Plain, method)(self, x)

    extended = type("Plain", (Plain,), {method: replacement})
    replacement.extended = extended
    return extended


@pytest.mark.parametrize("first", [None, own])
def test_the_code_behind_a_method_that_was_taken_while_replay_was_attached(first):
    """A wrapper holds on to the extended method; the router's own code is behind that."""
    module, extended = Plain(), extended_by("forward")
    if first is not None:
        vars(module)["forward"] = types.MethodType(first, module)
    moved = Moved(module, "forward", Plain, extended)
    module.__class__ = extended
    vars(module)["forward"] = by_closure(module.forward)
    assert code_of(module, "forward") is (first or Plain.forward)
    # Another, between the wrapper and the extended method, that never ends in the module.
    vars(module)["forward"] = by_default(by_closure(functools.partial(vars(module)["forward"])))
    assert code_of(module, "forward") is (first or Plain.forward)
    moved.put_back(module)


def test_the_method_of_the_class_itself_is_not_kept_aside():
    """accelerate puts it on each module; to call it there would be a detour."""
    module, extended = Plain(), extended_by("forward")
    before = types.MethodType(Plain.forward, module)
    vars(module)[BELOW_HOOK] = before
    moved = Moved(module, "forward", Plain, extended)
    assert ASIDE not in vars(module)
    assert vars(module)[BELOW_HOOK].__func__ is extended.forward
    moved.put_back(module)
    assert vars(module)[BELOW_HOOK] is before


@pytest.mark.parametrize("slot", ["forward", BELOW_HOOK])
def test_a_method_of_the_module_is_moved_and_put_back(slot):
    module, extended, before = Plain(), extended_by("forward"), object()
    vars(module)[slot] = before
    moved = Moved(module, "forward", Plain, extended)
    assert vars(module)[ASIDE] == {extended: before}
    if slot == "forward":
        assert "forward" not in vars(module)
    else:
        assert vars(module)[BELOW_HOOK].__self__ is module
        assert "forward" not in vars(module)
    moved.put_back(module)
    assert vars(module)[slot] is before
    assert ASIDE not in vars(module)


def test_other_methods_that_are_aside_stay_there():
    module, extended, held = Plain(), extended_by("forward"), object()
    vars(module)[ASIDE] = {"another": held}
    vars(module)["forward"] = types.MethodType(own, module)
    moved = Moved(module, "forward", Plain, extended)
    moved.put_back(module)
    assert vars(module)[ASIDE] == {"another": held}


def test_a_copy_runs_the_code_alone():
    module = Plain()
    vars(module).update({BELOW_HOOK: 1, "_hf_hook": 2, ASIDE: 3, "forward": 4, ROUTE: 5})
    on_copy(module, "forward", own)
    assert not vars(module).keys() & {BELOW_HOOK, "_hf_hook", ASIDE}
    assert module(torch.zeros(1)).item() == 10
    on_copy(module, ROUTE, Plain.route_tokens_to_experts)
    assert not vars(module).keys() & {"forward", ROUTE}


def counting(runs):
    """Methods of layers and routers that count their runs, each in its own right."""

    def put(module):
        plain = type(module).forward

        def forward(self, *args, **kwargs):
            runs.append(self)
            return plain(self, *args, **kwargs)

        vars(module)["forward"] = types.MethodType(forward, module)

    return put


def test_methods_of_layers_and_routers_run_whatever_is_attached_around_them():
    model, runs = tiny_moe(), []
    for layer in model.model.layers:
        counting(runs)(layer)
        counting(runs)(layer.mlp.gate)

    def run(**kwargs):
        runs.clear()
        with torch.no_grad():
            model(input_ids=tokens(), use_cache=False, **kwargs)
        return len(runs)

    assert run() == 2 * LAYERS
    replay = r3.attach(model)
    assert run() == run(routed_experts=random_ids()) == 2 * LAYERS
    held = [(layer, layer.forward) for layer in model.model.layers]
    for layer, taken in held:
        vars(layer)["forward"] = by_closure_of_all(taken)
    assert run(routed_experts=random_ids()) == 2 * LAYERS
    replay.detach()
    # The wrappers still hold on to the extended methods, and these to the layers' own.
    assert run() == 2 * LAYERS
    replay = r3.attach(model)
    assert run(routed_experts=random_ids()) == 2 * LAYERS
    assert replay.last.routers == LAYERS
    replay.detach()


def by_closure_of_all(function):
    def forward(*args, **kwargs):
        return function(*args, **kwargs)

    return forward


def test_extended_classes_look_like_those_of_the_model():
    model = tiny_moe()
    modules = [model.model.layers[0], model.model.layers[0].mlp.gate]
    before = [type(module) for module in modules]
    replay = r3.attach(model)
    for module, cls in zip(modules, before, strict=True):
        after = type(module)
        assert after is not cls
        assert issubclass(after, cls)
        for name in ("__name__", "__module__", "__qualname__", "__doc__"):
            assert getattr(after, name) == getattr(cls, name)
    assert repr(model) == repr(tiny_moe())
    replay.detach()


def test_an_extended_class_of_a_class_inside_a_function():
    class Inner(nn.Module):
        """What it is."""

        def forward(self, x):
            return x

    extended = _subclass(Inner, "forward", lambda self, x: x)
    assert (extended.__qualname__, extended.__doc__) == (Inner.__qualname__, "What it is.")
    assert extended.__module__ == __name__


class Toy(nn.Module):
    """A model whose block calls its router by keyword, as remote code may."""

    def __init__(self, choose=lambda scores: scores.topk(TOP_K)) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList([ToyLayer(choose)])

    def forward(self, input_ids=None, **kwargs):
        return self.layers[0](self.embed(input_ids), **kwargs)


class ToyLayer(nn.Module):
    def __init__(self, choose) -> None:
        super().__init__()
        self.gate = ToyGate(choose)
        self.experts = nn.Embedding(8, 16)

    def forward(self, hidden):
        weights, ids = self.gate(hidden=hidden.flatten(0, 1))
        return (weights[..., None] * self.experts(ids)).sum(1).view_as(hidden)


class ToyGate(nn.Module):
    def __init__(self, choose) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.choose = choose

    def forward(self, hidden):
        return self.choose((hidden @ self.weight.T).sigmoid())


def test_a_router_that_is_called_by_keyword():
    torch.manual_seed(0)
    model, ids = Toy(), tokens()
    live = model(ids)
    with r3.record(model) as recorder:
        assert torch.equal(model(ids), live)
    replay = r3.attach(model)
    taken = model.layers[0].gate.forward
    assert torch.equal(model(ids), live)
    assert torch.equal(model(ids, routed_experts=recorder.routing), live)
    replay.detach()
    assert taken(hidden=torch.zeros(3, 16))[1].shape == (3, TOP_K)


def test_a_router_that_searches_twice_after_attach_is_an_error():
    model = Toy()
    r3.attach(model)
    model.layers[0].gate.choose = lambda scores: (scores.topk(TOP_K)[0], scores.topk(TOP_K)[1])
    with pytest.raises(r3.ReplayError, match=r"router layers\.0\.gate: expected one top-k over 8 experts.*saw 2;"):
        model(tokens(), routed_experts=random_ids(layers=1))


def test_a_forward_without_tokens_is_refused():
    model = tiny_moe()
    replay = r3.attach(model)
    for call in (lambda: model(routed_experts=random_ids()), lambda: model(None, routed_experts=random_ids())):
        with pytest.raises(r3.ReplayError, match=r"expected input_ids or inputs_embeds .*, got neither"):
            call()
    embeds = model.model.embed_tokens(tokens())
    model(inputs_embeds=embeds, use_cache=False, routed_experts=random_ids())
    assert replay.last.rows_replayed == 20
    with r3.record(model) as recorder:
        model(inputs_embeds=embeds, use_cache=False)
    assert recorder.routing.shape[:2] == (2, 10)


def test_replay_may_be_attached_again_inside_a_recording():
    model = tiny_moe()
    with r3.record(model):
        for _ in range(2):
            replay = r3.attach(model)
            with pytest.raises(r3.ReplayError, match="attached to this Qwen3MoeForCausalLM already"):
                r3.attach(model)
            replay.detach()


def test_routing_has_more_layers_or_fewer_than_the_model_has_routers():
    model = tiny_moe(mlp_only_layers=[0])
    r3.attach(model)
    ids, valid = random_ids(), torch.ones(2, 10, dtype=torch.bool)
    every = r3.RolloutRouting(ids, valid, (0, 1, 2), 8)
    with torch.no_grad():
        found = model(tokens(), use_cache=False, routed_experts=every).logits
        wanted = model(tokens(), use_cache=False, routed_experts=ids[:, :, 1:]).logits
    assert torch.equal(found, wanted)
    with pytest.raises(r3.RoutingError, match=r"got \(2, 10, 1, 2\) of 8 experts; no routing for decoder layers \[2\]"):
        model(tokens(), routed_experts=every.layers((0, 1)))


def test_a_part_that_was_run_before_attach_may_be_repeated_after_it():
    from torch.utils.checkpoint import checkpoint

    def step(model, attached: bool):
        for layer in model.model.layers:
            plain = layer.mlp.forward
            layer.mlp.forward = lambda hidden, plain=plain: checkpoint(plain, hidden, use_reentrant=False)
        loss = model(tokens(), use_cache=False).logits.square().mean()
        if attached:
            r3.attach(model)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    found, wanted = step(tiny_moe().train(), True), step(tiny_moe().train(), False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
