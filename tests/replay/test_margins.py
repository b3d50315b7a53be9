"""Margins at the top-k boundary: of every family against what its own top-k saw, and of three by the formula."""

import math

import pytest
import torch
from models import LAYERS, random_ids, tiny_moe, tokens
from torch.overrides import TorchFunctionMode
from zoo import CASES

import r3
from r3.replay.topk import margin

BATCH, LENGTH = 2, 10
REPLAYED = [name for name, case in CASES.items() if case.refused is None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ScoresOfChoices(TorchFunctionMode):
    """The scores of every `topk` of K among E experts of each token, in the order of the calls."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.scores = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            of_experts = (scores.shape[-1], k) == (self.case.num_experts, self.case.top_k)
            if of_experts and scores.shape[:-1].numel() == BATCH * LENGTH:
                self.scores.append(scores.detach().double().reshape(BATCH, LENGTH, -1))
        return func(*args, **kwargs)


def recorded(case, model, **options):
    with torch.no_grad(), ScoresOfChoices(case) as seen, r3.record(model, **options) as recorder:
        logits = model(**case.inputs(BATCH, LENGTH)).logits
    return recorder, seen, logits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "fp32") for name in REPLAYED] + [("qwen3_moe", "bf16"), ("deepseek_v2-group_limited", "bf16")],
)
def test_the_margin_is_what_parts_the_chosen_from_the_others(name, dtype):
    case = CASES[name]
    model = case.build(DTYPES[dtype])
    plain, _, expected = recorded(case, model)
    recorder, seen, logits = recorded(case, model, margins=True)
    assert torch.equal(logits, expected)
    assert torch.equal(recorder.routing.expert_ids, plain.routing.expert_ids)
    assert torch.equal(recorder.expert_ids, plain.routing.expert_ids)
    margins = recorder.margins
    assert (margins.dtype, margins.shape) == (torch.float32, (BATCH, LENGTH, len(case.router_layers)))
    ids = recorder.routing.expert_ids.long()
    # Other top-ks may be of the same size, and have no column: those of attention heads, or over one group of experts.
    columns = {
        column: scores
        for scores in seen.scores
        for column in range(ids.shape[2])
        if bool((parted(scores, ids[:, :, column]) >= 0).all())
    }
    assert sorted(columns) == list(range(len(case.router_layers)))
    for column, scores in columns.items():
        apart = parted(scores, ids[:, :, column])
        torch.testing.assert_close(margins[:, :, column].double(), apart, rtol=1e-6, atol=0)
    assert (margins >= 0).all()


def parted(scores, ids):
    """The worst score among `ids` less the best of the other experts."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)
    worst, best = scores.masked_fill(~chosen, math.inf).amin(-1), scores.masked_fill(chosen, -math.inf).amax(-1)
    return (worst - best).masked_fill(worst == best, 0)


def router_logits(case, model):
    """float64 `[B, S, E]` of each router, from its input and weight."""
    inputs = {}
    handles = [
        router.register_forward_pre_hook(lambda module, args, layer=layer: inputs.update({layer: args[0].detach()}))
        for layer, router in case.routers(model)
    ]
    with torch.no_grad(), r3.record(model, margins=True) as recorder:
        model(**case.inputs(BATCH, LENGTH))
    for handle in handles:
        handle.remove()
    logits = [
        inputs[layer].double().reshape(BATCH, LENGTH, -1) @ router.weight.detach().double().T
        for layer, router in case.routers(model)
    ]
    return recorder.margins, logits


def boundary(scores, k):
    ordered = scores.sort(-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k]


def test_softmax_routers_have_the_margin_of_their_probabilities():
    case = CASES["qwen3_moe"]
    margins, logits = router_logits(case, case.build())
    expected = [boundary(each.softmax(-1), case.top_k) for each in logits]
    torch.testing.assert_close(margins.double(), torch.stack(expected, -1), rtol=1e-3, atol=1e-6)


def test_grouped_routers_have_the_margin_among_the_experts_that_their_groups_allow():
    name = next(name for name in REPLAYED if name.startswith("deepseek_v3"))
    case = CASES[name]
    model = case.build()
    margins, logits = router_logits(case, model)
    restricted = 0
    for column, ((_, router), each) in enumerate(zip(case.routers(model), logits, strict=True)):
        scores = each.sigmoid() + router.e_score_correction_bias.double()
        n_groups, kept = model.config.n_group, model.config.topk_group
        best = scores.unflatten(-1, (n_groups, -1)).topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        allowed = torch.zeros(BATCH, LENGTH, n_groups, dtype=torch.bool).scatter(-1, best, True)
        allowed = allowed.repeat_interleave(case.num_experts // n_groups, -1)
        expected = boundary(scores.where(allowed, -math.inf), case.top_k)
        torch.testing.assert_close(margins[:, :, column].double(), expected, rtol=1e-3, atol=1e-6)
        restricted += int((boundary(scores, case.top_k) - expected).abs().gt(1e-6).sum())
    assert restricted, "no group was ever ruled out: this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_margins_of_given_scores(dtype):
    scores = torch.tensor([[4.0, 1.0, 3.5, 2.0], [1.0, 1.0, 1.0, 1.0], [5.0, 4.0, -math.inf, -math.inf]], dtype=dtype)
    found = margin(scores, 2, lambda s: s.topk(3))
    assert found.dtype == torch.float32
    assert found.tolist() == [1.5, 0, math.inf]
    assert margin(scores, 3, lambda s: s.topk(4)).tolist() == [1, 0, 0]
    assert margin(scores[:1], 4, lambda s: 1 / 0).tolist() == [math.inf]
    assert margin(scores.view(3, 1, 4), 1, lambda s: s.topk(2)).tolist() == [0.5, 0, 1]
    assert math.isnan(margin(scores * math.nan, 2, lambda s: s.topk(3))[0])
    assert margin(scores, 2, lambda s: s.topk(3, largest=False)).tolist() == [1.5, 0, math.inf]


def test_all_experts_chosen_leaves_an_infinite_margin():
    model = tiny_moe(num_experts_per_tok=8)
    with r3.record(model, margins=True) as recorder:
        model(input_ids=tokens(), use_cache=False)
    assert torch.equal(recorder.margins, torch.full((2, 10, LAYERS), math.inf))


def test_margins_are_of_live_forwards_and_must_be_asked_for():
    model = tiny_moe()
    r3.attach(model)
    with r3.record(model) as recorder:
        model(input_ids=tokens(), use_cache=False)
    with pytest.raises(r3.ReplayError, match=r"ask for them with r3\.record\(model, margins=True\)"):
        _ = recorder.margins
    with r3.record(model, margins=True) as recorder:
        with pytest.raises(r3.ReplayError, match="nothing recorded"):
            _ = recorder.margins
        model(input_ids=tokens(), use_cache=False, routed_experts=random_ids())
        with pytest.raises(r3.ReplayError, match="expected a live forward, got a replayed one"):
            _ = recorder.margins
        assert torch.equal(recorder.expert_ids.long(), random_ids())
        model(input_ids=tokens(), use_cache=False)
        first = recorder.margins
        model(input_ids=tokens(seed=1), use_cache=False)
        assert not torch.equal(recorder.margins, first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_margins_are_of_the_forward_and_hold_no_graph(reentrant):
    model = tiny_moe().train()
    with r3.record(model, margins=True) as recorder:
        model(input_ids=tokens(), use_cache=False)
        expected = recorder.margins
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model(input_ids=tokens(), use_cache=False).logits.square().mean()
        assert torch.equal(recorder.margins, expected)
        loss.backward()
        assert torch.equal(recorder.margins, expected)
    assert not recorder.margins.requires_grad


@pytest.mark.parametrize("whole", [True, False])
def test_margins_of_a_compiled_model(whole):
    torch._dynamo.reset()
    plain, model = tiny_moe(), tiny_moe()
    for each in (plain, model):
        each.set_experts_implementation("grouped_mm")
    with torch.no_grad(), r3.record(plain, margins=True) as expected:
        plain(input_ids=tokens(), use_cache=False)
    with torch.no_grad(), r3.record(model, margins=True) as recorder:
        for layer in () if whole else model.model.layers:
            layer.compile(backend="eager")
        compiled = torch.compile(model, backend="eager") if whole else model
        for _ in range(2):
            compiled(input_ids=tokens(), use_cache=False)
    assert torch.equal(recorder.margins, expected.margins)
