"""The proof at attach, on small routers: what it runs, what it leaves alone, and what it says when it refuses one."""

import re
import types

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import r3
from r3.replay.discovery import ROUTE, RouterSite
from r3.replay.proof import prove, prove_all
from r3.replay.topk import TopKSubstitution

HIDDEN, EXPERTS, TOP_K = 16, 8, 2


class Gate(nn.Module):
    """A router whose scores go through `choose(self, scores)`."""

    def __init__(self, choose, experts: int = EXPERTS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN))
        self.choose = choose

    def forward(self, hidden):
        return self.choose(self, (hidden @ self.weight.T).softmax(-1))


def normalised(_, scores):
    values, ids = scores.topk(TOP_K)
    return values / values.sum(-1, keepdim=True), ids


def site_of(router: nn.Module, owner: nn.Module | None = None, method: str = "forward") -> RouterSite:
    owner = router if owner is None else owner
    return RouterSite(name="layers.0.gate", layer_id=0, layer=owner, router=router, owner=owner, method=method)


def refusal(router: nn.Module, **more) -> str:
    with pytest.raises(r3.UnsupportedModelError) as caught:
        prove(site_of(router, **more))
    head, _, reason = str(caught.value).partition(" cannot be replayed exactly: ")
    assert head == f"layers.0.gate ({type(router).__name__})"
    return reason


class Block(nn.Module):
    """It chooses in a method of its own, with a bias and a scale of its own; some of its parts are None."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(torch.ones(EXPERTS))
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("groups", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_parameter("none", None)
        self.register_buffer("neither", None)

    def route_tokens_to_experts(self, hidden_states, router_logits):
        assert self.none is None
        assert self.neither is None
        assert torch.equal(router_logits, self.gate(hidden_states))
        scores = (router_logits * self.scale).sigmoid()
        _, ids = (scores + self.bias[self.groups]).topk(TOP_K)
        return ids, scores.gather(-1, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_proved_without_its_weights_and_experts(dtype):
    block = Block().to(dtype).to("meta").eval()
    before = dict(vars(block))
    found = prove(site_of(block.gate, block, ROUTE))
    assert (found.num_experts, found.top_k, found.limited) == (EXPERTS, TOP_K, False)
    assert vars(block) == before
    assert all(p.is_meta for p in block.parameters())


@pytest.mark.parametrize("part", ["scale", "bias"])
def test_the_blocks_own_tensors_are_random_in_the_proof(part):
    """With zeros and ones a use of them that is wrong would pass."""
    block, seen = Block(), []

    class Looking(Block):
        def route_tokens_to_experts(self, hidden_states, router_logits):
            seen.append((getattr(self, part).clone(), self.groups.dtype, type(getattr(self, part))))
            return super().route_tokens_to_experts(hidden_states, router_logits)

    block.__class__ = Looking
    prove(site_of(block.gate, block, ROUTE))
    values, groups, kind = seen[0]
    assert values.unique().numel() == EXPERTS
    assert groups == torch.int64
    assert kind is (nn.Parameter if part == "scale" else torch.Tensor)


class OldBlock(nn.Module):
    """HunYuan before transformers 5.13: what it calls hidden states are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Linked()
        self.experts = nn.Identity()

    def route_tokens_to_experts(self, hidden_states):
        values, ids = hidden_states.softmax(-1).topk(TOP_K)
        return ids, values


class Linked(nn.Linear):
    """A gate that returns its logits among other things."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, EXPERTS, bias=False)

    def forward(self, hidden):
        return super().forward(hidden), None


def test_logits_that_a_block_calls_hidden_states():
    block = OldBlock()
    assert prove(site_of(block.gate, block, ROUTE)).num_experts == EXPERTS


@pytest.mark.parametrize("make", [lambda: Gate(normalised), Block])
def test_random_numbers_of_the_caller_stay_as_they_were(make):
    """A run is the same with and without replay."""
    module = make()
    site = site_of(module) if isinstance(module, Gate) else site_of(module.gate, module, ROUTE)
    before = torch.get_rng_state()
    prove(site)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_copy_has_the_dtypes_of_the_router():
    seen = []

    class Looking(Gate):
        def __init__(self) -> None:
            super().__init__(normalised)
            self.register_buffer("bias", torch.zeros(EXPERTS))
            self.register_buffer("counts", torch.zeros(EXPERTS, dtype=torch.int32))

        def forward(self, hidden):
            seen.append((hidden.dtype, self.weight.dtype, self.bias.dtype, self.counts.dtype))
            return super().forward(hidden)

    prove(site_of(Looking().bfloat16()))
    assert set(seen) == {(*[torch.bfloat16] * 3, torch.int32)}


class Uncopied:
    """Something large, of which no copy must be made."""

    def __call__(self, *args):
        raise AssertionError("ran in the proof")

    def __deepcopy__(self, memo):
        raise AssertionError("was copied for the proof")


def test_neither_hooks_nor_what_they_hold_are_copied_or_run():
    router = Gate(normalised)
    router.register_forward_pre_hook(Uncopied())
    router.register_forward_hook(Uncopied())
    router.register_full_backward_hook(Uncopied())
    hooks = [len(router._forward_pre_hooks), len(router._forward_hooks), len(router._backward_hooks)]
    prove(site_of(router))
    assert hooks == [1, 1, 1]


def test_what_is_behind_a_method_of_the_router_itself_is_not_copied():
    router, held = Gate(normalised), Uncopied()
    plain = router.forward

    def forward(hidden):
        return plain(hidden) if held else None

    forward.held = held
    vars(router)["forward"] = forward
    vars(router)["_hf_hook"] = held
    prove(site_of(router))
    assert vars(router)["forward"] is forward


def spelled(_, scores, call):
    values, ids = call(scores)
    return values / values.sum(-1, keepdim=True), ids


CALLS = {
    "method": lambda s: s.topk(TOP_K),
    "function": lambda s: torch.topk(s, TOP_K),
    "keywords": lambda s: torch.topk(input=s, k=TOP_K),
    "all keywords": lambda s: torch.topk(input=s, k=TOP_K, dim=-1, largest=True, sorted=True),
    "last dimension": lambda s: torch.topk(s, k=TOP_K, dim=1),
    "all by position": lambda s: s.topk(TOP_K, 1, True, True),
    "dimension from behind": lambda s: torch.topk(s, TOP_K, -1),
    "unsorted": lambda s: torch.topk(s, TOP_K, sorted=False),
    "smallest of the negative": lambda s: ((n := (-s).topk(TOP_K, largest=False))[0].neg(), n[1]),
    "smallest by position": lambda s: ((n := (-s).topk(TOP_K, -1, False))[0].neg(), n[1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_top_k_may_be_spelled_in_any_way(name):
    """Also where some rows are live, and the model's own search has to be repeated for them."""
    torch.manual_seed(0)
    call, scores = CALLS[name], torch.rand(6, EXPERTS)
    router = Gate(lambda self, s: spelled(self, s, call))
    choice = prove(site_of(router))
    assert (choice.num_experts, choice.top_k, choice.dims) == (EXPERTS, TOP_K, 2)
    values, own = call(scores)
    foreign = torch.rand(6, EXPERTS).argsort(-1)[:, :TOP_K]
    live = torch.tensor([1, 4])
    with TopKSubstitution(choice, foreign, live, site_of(router)) as mode:
        found = call(scores)
    expected = foreign.index_copy(0, live, own[live])
    assert torch.equal(found[1], expected)
    torch.testing.assert_close(found[0], scores.gather(-1, expected))
    assert mode.count == 1
    with TopKSubstitution(choice, None, None, site_of(router), margins=True) as mode:
        assert torch.equal(call(scores)[0], values)
    best = scores.sort(-1, descending=True).values
    torch.testing.assert_close(mode.margin, best[:, TOP_K - 1] - best[:, TOP_K])


def test_a_choice_of_tokens_for_each_expert_is_another():
    def with_capacity(self, scores):
        scores.topk(TOP_K, dim=0)
        torch.topk(scores, TOP_K, 0)
        return normalised(self, scores)

    assert prove(site_of(Gate(with_capacity))).num_experts == EXPERTS

    def of_a_batch(self, scores):
        values, ids = scores[None].topk(TOP_K)
        return values[0], ids[0]

    assert prove(site_of(Gate(of_a_batch))).dims == 3


class Searches(TorchFunctionMode):
    """How many rows each top-k is given that is searched."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.topk, torch.Tensor.topk):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("live", [None, [1, 4]])
def test_groups_are_searched_for_live_rows_alone(live):
    torch.manual_seed(0)
    router = Gate(limited_by_groups)
    choice, hidden = prove(site_of(router)), torch.randn(6, HIDDEN)
    foreign = torch.rand(6, EXPERTS).argsort(-1)[:, :TOP_K]
    rows = None if live is None else torch.tensor(live)
    with Searches() as searches, TopKSubstitution(choice, foreign, rows, site_of(router)):
        values, ids = router(hidden)
    assert searches.rows == ([] if live is None else [len(live)] * 2)
    scores = (hidden @ router.weight.T).softmax(-1)
    expected = foreign if live is None else foreign.index_copy(0, rows, router(hidden)[1][rows])
    assert torch.equal(ids, expected)
    assert torch.equal(values, scores.gather(-1, expected))

    # Where others follow the choice, or are of other rows or dimensions, they run as they are.
    def with_others(self, scores):
        found = limited_by_groups(self, scores)
        assert torch.equal(scores.topk(3)[0], scores.sort(-1, descending=True).values[:, :3])
        return found

    def with_others_before(self, scores):
        assert torch.equal(scores.topk(3, dim=0)[0], scores.sort(0, descending=True).values[:3])
        assert torch.equal(scores[:2].topk(3)[0], scores[:2].sort(-1, descending=True).values[:, :3])
        return limited_by_groups(self, scores)

    for router.choose in (with_others, with_others_before):
        with TopKSubstitution(choice, foreign, rows, site_of(router)):
            assert torch.equal(router(hidden)[1], expected)


def are_own(ids, scores):
    return ids == scores.detach().argsort(-1, descending=True)[:, :TOP_K]


def limited_by_groups(self, scores, weight=0.0):
    groups = scores.view(-1, 4, 2)
    best, kept = groups.amax(-1).topk(2)
    mask = torch.zeros(len(scores), 4).scatter(-1, kept, 1.0).repeat_interleave(2, -1)
    values, ids = scores.masked_fill(mask == 0, 0.0).topk(TOP_K)
    return values + weight * best.sum(-1, keepdim=True), ids


def test_a_mask_may_be_filled_in_any_way():
    """A foreign expert that the mask rules out has the weight that it has without the mask."""

    def by_keyword(self, scores):
        masked = torch.masked_fill(input=scores, mask=scores < scores.median(-1, keepdim=True).values, value=0.0)
        return masked.topk(TOP_K)

    def by_method(self, scores):
        return scores.masked_fill(mask=scores < scores.median(-1, keepdim=True).values, value=0.0).topk(TOP_K)

    for choose in (by_keyword, by_method):
        assert prove(site_of(Gate(choose))).top_k == TOP_K


def test_other_top_ks_that_only_limit_are_known_from_those_that_weigh():
    assert prove(site_of(Gate(limited_by_groups))).limited
    assert not prove(site_of(Gate(lambda self, scores: limited_by_groups(self, scores, 0.5)))).limited
    assert not prove(site_of(Gate(normalised))).limited

    def under_own_ids(self, scores):
        """Its first top-k matters under the ids that are its own."""
        three = scores.topk(3)[0].sum(-1, keepdim=True)
        values, ids = scores.topk(TOP_K)
        return torch.where(are_own(ids, scores).all(-1, keepdim=True), values / three, values), ids

    assert not prove(site_of(Gate(under_own_ids))).limited


def random_scores(self, scores):
    return normalised(self, scores * torch.rand_like(scores))


class Restless(Gate):
    """It searches twice from its second forward on."""

    runs = 0

    def forward(self, hidden):
        self.runs += 1
        values, ids = super().forward(hidden)
        return (values, super().forward(hidden)[1]) if self.runs > 2 else (values, ids)


def constant(_, scores):
    return torch.ones(len(scores), TOP_K), scores.topk(TOP_K)[1]


def masked(self, scores):
    floor = scores.sort(-1, descending=True).values[:, TOP_K - 1, None]
    return (scores * (scores >= floor)).topk(TOP_K)


def stubborn(_, scores):
    values, _ = scores.topk(TOP_K)
    return values, scores.argsort(-1, descending=True)[:, :TOP_K]


def ids_alone(_, scores):
    return scores.topk(TOP_K)[1]


def of_no_gradient(_, scores):
    values, ids = scores.topk(TOP_K)
    return values.detach() + 0 * values, ids


def of_infinite_gradient(_, scores):
    values, ids = scores.topk(TOP_K)
    return values + (values - values.detach()).abs().sqrt(), ids


def with_detached_others(self, scores):
    """Some parameters get a gradient under the router's own ids only."""
    values, ids = scores.topk(TOP_K)
    own = bool(are_own(ids, scores).all())
    for name in self.only_live:
        scale = getattr(self, name)
        values = values * (scale if own else scale.detach())
    return values, ids


REFUSED = {
    random_scores: "under its own ids its outputs differ from live",
    stubborn: "it does not return the ids that it was given",
    constant: "under foreign ids its weights do not follow the ids",
    ids_alone: "under foreign ids its weights do not follow the ids",
    masked: "under foreign ids some weights are zero: they come from scores cut to the live top-k",
    of_no_gradient: "under foreign ids no finite gradient reaches the gate",
    of_infinite_gradient: "under foreign ids no finite gradient reaches the gate",
}


@pytest.mark.parametrize("choose", REFUSED, ids=lambda choose: choose.__name__)
def test_what_is_not_exact_is_refused_with_the_reason(choose):
    assert refusal(Gate(choose)) == REFUSED[choose]


def test_parameters_that_foreign_ids_do_not_train_are_named():
    router = Gate(with_detached_others)
    router.temperature = nn.Parameter(torch.ones(()))
    router.a_scale = nn.Parameter(torch.ones(()))
    for router.only_live in (["temperature"], ["temperature", "a_scale"]):
        named = ", ".join(sorted(router.only_live))
        assert refusal(router) == f"under foreign ids no finite gradient reaches {named}"
    router.only_live = []
    prove(site_of(router))


def test_a_choice_that_is_not_there_or_not_alone_is_refused_with_counts():
    counts = "expected one top-k over the experts of each token whose indices it returns, saw {} (and {} others)"

    def twice(_, scores):
        return scores.topk(TOP_K)[0], scores.topk(TOP_K)[1]

    def by_sorting(_, scores):
        scores.topk(TOP_K + 1)
        values, ids = scores.sort(-1, descending=True)
        return values[:, :TOP_K], ids[:, :TOP_K]

    assert refusal(Gate(twice)) == counts.format(2, 0)
    assert refusal(Gate(by_sorting)) == counts.format(0, 1)
    assert refusal(Restless(normalised)) == f"expected one top-k of {TOP_K} among {EXPERTS}, saw 2"


def test_a_router_that_no_copy_can_run_is_refused_with_the_remedy():
    router = Gate(normalised)
    router.forward = lambda hidden: None
    assert refusal(router) == (
        "`forward` was put on this Gate itself, is not bound to it and wraps nothing that is, so that no copy can run "
        "it: bind it with types.MethodType"
    )
    flat = Gate(normalised)
    flat.weight = nn.Parameter(torch.randn(EXPERTS * HIDDEN))
    assert refusal(flat) == (
        "it has no 2-D weight [E, H]. If a wrapper has flattened or partitioned the weights, attach before it wraps "
        "the model"
    )

    def failing(_, scores):
        raise ValueError(f"scores {list(scores.shape)}")

    given = "Gate.forward() takes 2 positional arguments but 3 were given"
    first, *attempts = [line.strip() for line in refusal(Gate(failing)).splitlines()]
    assert first.startswith("it could not be run on its own, given tensors of shapes")
    assert attempts == [
        f"(64, {HIDDEN}): ValueError: scores [64, {EXPERTS}]",
        f"(1, 64, {HIDDEN}): ValueError: scores [1, 64, {EXPERTS}]",
        f"(64, {HIDDEN}), ({EXPERTS},): TypeError: {given}",
        f"(1, 64, {HIDDEN}), ({EXPERTS},): TypeError: {given}",
    ]


def test_routers_of_other_sizes_are_proved_by_themselves():
    alike = [site_of(Gate(normalised)) for _ in range(2)]
    assert prove_all(alike) == [prove(alike[0])] * 2
    with pytest.raises(r3.UnsupportedModelError, match=re.escape("found [(6, 2), (8, 2)]")):
        prove_all([*alike, site_of(Gate(normalised, experts=6))])
    sorting = type("Gate", (Gate,), {"forward": lambda self, hidden: (hidden @ self.weight.T).sort(-1)})(normalised)
    with pytest.raises(r3.UnsupportedModelError, match="saw 0"):
        prove_all([*alike, site_of(sorting)])
    patched = Gate(normalised)
    patched.forward = types.MethodType(sorting.forward.__func__, patched)
    with pytest.raises(r3.UnsupportedModelError, match="saw 0"):
        prove_all([*alike, site_of(patched)])


def test_a_gate_that_was_patched_in_one_of_many_blocks_is_proved_by_itself():
    blocks = [Block() for _ in range(3)]
    sites = [site_of(block.gate, block, ROUTE) for block in blocks]
    assert len(prove_all(sites)) == 3
    gate = blocks[1].gate
    gate.forward = types.MethodType(lambda self, hidden: hidden @ self.weight.detach().T, gate)
    with pytest.raises(r3.UnsupportedModelError, match="no finite gradient"):
        prove_all(sites)
