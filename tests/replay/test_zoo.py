"""The zoo itself: complete, alive, and in agreement with its own formulas."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from zoo import ARCHITECTURES, CASES, NOT_HERE, Case, table
from zoo.case import CORRECTIONS

TOKENS = 20
OPEN = [name for name, case in CASES.items() if case.refused is None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_ROUTES = re.compile(r"Router|Gat(e|ing)|Mo[eE]|FFN|Experts|SparseMLP")
# Ways to choose: top-k, and the argmax of top-1 and top-2 routers.
_CHOOSES = re.compile(r"\b(topk|argmax|sparsemixer)\(")


class NoTies(TorchFunctionMode):
    """Fails when the last chosen expert and the first one left out have the same score."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.choices = case, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0]
            k = result.indices.shape[-1]
            if (scores.shape[-1], k) == (self.case.num_experts, self.case.top_k):
                best = scores.sort(-1, descending=True).values
                assert (best[..., k - 1] > best[..., k]).all()
                self.choices += 1
        return result


def _has_router(source: str) -> bool:
    if re.search(r"""["']router_logits["']\s*:""", source):
        return True
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return any(_ROUTES.search(c.name) and _CHOOSES.search(ast.get_source_segment(source, c) or "") for c in classes)


def _folders_with_routers() -> Iterator[str]:
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if ("router" in source or _CHOOSES.search(source)) and _has_router(source):
            yield path.parent.name


def _folder(architecture: str) -> str:
    return getattr(transformers, architecture).__module__.split(".")[-2]


def test_every_family_with_a_router_is_here():
    found = set(_folders_with_routers())
    here = {_folder(architecture) for architecture in ARCHITECTURES}
    missing = found - here - NOT_HERE.keys()
    assert not missing, f"families without a case; add one, or say why not in NOT_HERE: {sorted(missing)}"
    assert not here & NOT_HERE.keys()
    assert len(found) > 40, "the search itself finds too little"


@pytest.mark.long
@pytest.mark.release
@pytest.mark.parametrize("name", CASES)
def test_model_is_the_same_at_each_build(name):
    case = CASES[name]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one = dict(case.build().named_parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    two = dict(case.build().named_parameters())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(value.isfinite().all() for value in one.values())


@pytest.mark.long
@pytest.mark.release
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, key) for name in OPEN for key, dtype in DTYPES.items() if dtype in CASES[name].dtypes]
)
def test_forward_and_observation(name, dtype):
    case, dtype = CASES[name], DTYPES[dtype]
    model = case.build(dtype)
    with torch.no_grad(), case.observe(model) as seen, NoTies(case) as ties:
        logits = model(**case.inputs()).logits
    assert ties.choices >= len(case.router_layers)
    assert logits.shape[:2] == (2, 10)
    assert logits.isfinite().all()
    assert [layer for layer, _ in case.routers(model)] == list(case.router_layers) == sorted(seen)
    assert all(layer < case.num_layers for layer in seen)
    for layer, one in seen.items():
        assert one.ids.dtype == torch.int64
        assert one.ids.shape == one.weights.shape == (TOKENS, case.top_k), layer
        assert one.ids.min() >= 0
        assert one.ids.max() < case.num_experts
        assert all(len(set(row)) == case.top_k for row in one.ids.tolist())


@pytest.fixture(scope="module", params=OPEN)
def live(request):
    """(case, model, what its experts got in a live forward)"""
    case = CASES[request.param]
    model = case.build()
    with case.observe(model) as seen:
        model(**case.inputs())
    return case, model, seen


def test_routing_is_varied(live):
    _, _, seen = live
    choices = {layer: [tuple(sorted(row)) for row in one.ids.tolist()] for layer, one in seen.items()}
    assert all(len(set(rows)) >= 3 for rows in choices.values())
    first, *others = choices.values()
    assert all(rows != first for rows in others), "two layers route alike"


def test_formula_gives_live_weights_and_gradients(live):
    case, model, seen = live
    for layer, router in case.routers(model):
        one = seen[layer]
        weights = case.weights(model, layer, one, one.ids)
        assert weights.dtype == torch.float64
        torch.testing.assert_close(one.weights.double(), weights, rtol=1e-5, atol=0)
        # Squared: the sum of normalised weights does not depend on the router.
        weights.pow(2).sum().backward()
        gradients = [p.grad for p in router.parameters() if p.requires_grad]
        assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_formula_depends_on_ids(live):
    case, model, seen = live
    for layer, one in seen.items():
        others = (one.ids + 1) % case.num_experts
        assert not torch.allclose(case.weights(model, layer, one, others), one.weights.double(), rtol=1e-2)


def _choice_of_first_router(case: Case, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), case.observe(model) as seen:
        model(**case.inputs())
    first = seen[case.router_layers[0]]
    return first.args[0], first.ids.sort(-1).values


def _without_corrections(case: Case, model: torch.nn.Module) -> bool:
    biases = [t for key, t in (*model.named_parameters(), *model.named_buffers()) if key.endswith(CORRECTIONS)]
    for bias in biases:
        bias.data.zero_()
    return bool(biases)


def _without_group_limit(case: Case, model: torch.nn.Module) -> bool:
    layer, router = case.routers(model)[0]
    # The router limits the groups, or its block, before transformers 5.13.
    block = model.get_submodule(case.router.format(layer).rpartition(".")[0])
    owner = router if hasattr(router, "num_group") else block
    groups = getattr(owner, "num_group", None) or getattr(owner, "n_group", None) or 1
    owner.topk_group = groups
    # DeepSeek-V2 has the setting also where it chooses greedily.
    return groups > 1 and getattr(owner, "topk_method", "grouped") != "greedy"


@pytest.mark.long
@pytest.mark.release
@pytest.mark.parametrize(("without", "least"), [(_without_corrections, 20), (_without_group_limit, 5)])
def test_what_acts_on_the_choice_alone_does_act(without, least):
    idle, tried = [], 0
    for name in OPEN:
        case, model = CASES[name], CASES[name].build()
        hidden, ids = _choice_of_first_router(case, model)
        if not without(case, model):
            continue
        tried += 1
        hidden_without, ids_without = _choice_of_first_router(case, model)
        assert torch.equal(hidden, hidden_without)
        if torch.equal(ids, ids_without):
            idle.append(name)
    assert not idle
    assert tried >= least


@pytest.mark.long
@pytest.mark.release
@pytest.mark.parametrize("name", OPEN)
def test_experts_implementation_is_the_one_asked_for(name, monkeypatch):
    case = CASES[name]
    calls = []
    real = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", counted)
    logits = {}
    for experts in case.experts:
        calls.clear()
        with torch.no_grad():
            logits[experts] = case.build(experts=experts)(**case.inputs()).logits
        assert bool(calls) == (experts == "grouped_mm")
    if len(logits) == 2:
        torch.testing.assert_close(logits["grouped_mm"], logits["eager"], rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="experts is one of"):
            case.build(experts="grouped_mm")


@pytest.mark.parametrize("name", [name for name in CASES if name not in OPEN])
def test_refused_cases_still_have_a_model_and_inputs(name):
    case = CASES[name]
    assert case.build().training is False
    assert case.inputs(batch=3, length=5)["input_ids"].shape == (3, 5)


def test_the_support_table_is_that_of_the_last_proof():
    proved = json.loads(table.PROVED.read_text())
    assert table.PAGE.read_text() == table.page(proved), "docs/reference/models.md: run pytest with --support-table"
    assert proved.get(transformers.__version__, CASES).keys() == CASES.keys()
