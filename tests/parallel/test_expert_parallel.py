"""A model that transformers spread over ranks = one process, on log-probabilities, loss, gradients and chosen ids."""

import contextlib
import functools
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from ranks import Ranks
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

import r3
from r3.releases import gathers_split_parts, has_right_expert_parallelism

if not hasattr(DistributedConfig, "ep_size"):
    pytest.skip("needs transformers 5.19 or later, where expert parallelism has a size", allow_module_level=True)

import expert_parallel_jobs as jobs


@pytest.fixture(scope="module")
def two(device):
    with contextlib.closing(Ranks(2, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four(device):
    with contextlib.closing(Ranks(4, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folders():
    with contextlib.closing(jobs.Folders()) as folders:
        yield folders


@functools.cache
def reference(folder, replayed):
    return jobs.reference(folder, replayed=replayed)


def on(ranks, job, folder, layout, *more, timeout_s=120.0):
    """What each rank returns. In a release whose experts would be wrong there, r3 refuses, and the test ends."""
    if has_right_expert_parallelism() or not {"fsdp_size", "ep_size"} <= layout.keys():
        return ranks.all(job, folder, layout, *more, timeout_s=timeout_s)
    for refused in ranks.all(jobs.refusal, folder, layout, "FSDP2 beside expert parallelism"):
        assert "the experts' gradients are too small; 5.23 or later is right" in refused
    pytest.skip(f"transformers {transformers.__version__} is refused by name here, as it must be")


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def check(found, folder, replayed=True):
    expected = reference(folder, replayed)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected["grads"].values())
    compare(found, expected)


def compare(found, expected):
    assert found["grads"].keys() == expected["grads"].keys()
    worst = {name: gap(found["grads"][name], gradient) for name, gradient in expected["grads"].items()}
    worst["logprobs"] = gap(found["logprobs"], expected["logprobs"])
    worst["loss"] = abs(found["loss"] - expected["loss"]) / float(expected["logprobs"].abs().max())
    assert not {name: value for name, value in worst.items() if not value < 2e-5}


TENSOR = dict(tp_size=2)
BOTH = dict(tp_size=2, ep_size=2)  # transformers chooses all-to-all in training, all-reduce without gradients
EXPERT = dict(fsdp_size=2, ep_size=2)
# Before 5.23 experts of tensor parallel ranks know nothing else.
CHOOSES = hasattr(DistributedConfig, "ep_implementation")
ALL_REDUCE = BOTH | (dict(ep_implementation="all_reduce") if CHOOSES else {})
SLICED = dict(sequence=2)
ON_TWO = {
    "tensor": (TENSOR, {}),
    "tensor and expert": (BOTH, {}),
    "tensor and expert, packed, fused head": (BOTH, dict(packed=True, fused=True)),
    "fsdp2": (dict(fsdp_size=2), {}),
    "expert": (EXPERT, {}),
    "expert, padded, fused head": (EXPERT, dict(fused=True)),
    "expert, slices": (EXPERT, SLICED),
    "expert, slices, fused head": (EXPERT, SLICED | dict(fused=True)),
}
ON_FOUR = {
    "tensor and expert": (dict(tp_size=4, ep_size=4), {}),
    "expert": (dict(fsdp_size=4, ep_size=4), {}),
    "fsdp2 x expert": (dict(fsdp_size=4, ep_size=2), {}),
    "fsdp2 x tensor and expert": (dict(fsdp_size=2, tp_size=2, ep_size=2), {}),
    "experts over more ranks than tensors": (dict(fsdp_size=2, tp_size=2, ep_size=4), {}),
    "fsdp2 x expert, slices": (dict(fsdp_size=4, ep_size=2), SLICED | dict(fused=True)),
    "expert, slices over two": (dict(fsdp_size=4, ep_size=4), SLICED),
    "expert, slices over four": (dict(fsdp_size=4, ep_size=4), dict(sequence=4)),
}
# What the gate runs; the rest is long.
QUICK = {"tensor and expert, packed, fused head", "expert, slices, fused head"}
LAYOUTS = [how if how in QUICK else pytest.param(how, marks=pytest.mark.long) for how in ON_TWO]


@pytest.mark.parametrize("family", list(jobs.FAMILIES))
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "live"])
def test_two_ranks(two, folders, family, checkpointing, replayed, how):
    layout, options = ON_TWO[how]
    found = on(two, call, folders.of(family), layout, options | dict(checkpointing=checkpointing, replayed=replayed))
    check(found[0], folders.of(family), replayed)


# The gate has four ranks in tests/trainer_hooks/test_expert_parallel_trainer.py.
@pytest.mark.long
@pytest.mark.parametrize("family", list(jobs.FAMILIES))
@pytest.mark.parametrize("how", list(ON_FOUR))
@pytest.mark.parametrize("checkpointing", [True, False])
def test_four_ranks(four, folders, family, checkpointing, how):
    layout, options = ON_FOUR[how]
    found = on(four, call, folders.of(family), layout, options | dict(checkpointing=checkpointing))
    check(found[0], folders.of(family))


@pytest.mark.parametrize("experts", ["eager", "r3_grouped"])
@pytest.mark.parametrize("layout", [EXPERT, ALL_REDUCE], ids=["expert", "all-reduce"])
def test_experts_functions(two, folders, layout, experts):
    folder = folders.of("qwen3_moe")
    check(on(two, call, folder, layout, dict(experts=experts))[0], folder)


@pytest.mark.parametrize("layout", [BOTH, EXPERT], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_ids_are_those_of_all_ranks_wherever_they_are_seen(two, folders, family, layout):
    folder = folders.of(family)
    expected = reference(folder, True)
    found = on(two, call, folder, layout, {})
    same_rows = layout.get("tp_size", 1) > 1
    for rank, one in enumerate(found):
        rows = slice(None) if same_rows else slice(rank, None, 2)
        tokens = expected["mask"][rows]
        assert torch.equal(one["chosen"][tokens], expected["chosen"][rows][tokens])
        report = one["report"]
        assert report.rows_replayed + report.rows_live == one["chosen"].shape[0] * one["chosen"].shape[1]
    total = sum(one["report"].pairs_replayed for one in found)
    assert total == expected["report"].pairs_replayed * (2 if same_rows else 1)
    assert expected["chosen"].max() == 7, "of eight experts; a rank holds four"


def test_padding_is_spread_over_the_ranks(two, folders):
    """16 of 40 rows are padding. Routed live they are one token, which goes to one expert's rank."""
    chosen = torch.cat([one["chosen"] for one in on(two, call, folders.of("qwen3_moe"), EXPERT, {})])
    mask = reference(folders.of("qwen3_moe"), True)["mask"]
    padding = ~torch.cat([mask[0::2], mask[1::2]])
    for layer in range(chosen.shape[2]):
        counts = chosen[..., layer, :][padding].flatten().bincount(minlength=8)
        assert counts.max() <= 2 * counts.float().mean(), counts
    live = torch.cat([one["chosen"] for one in on(two, call, folders.of("qwen3_moe"), EXPERT, dict(replayed=False))])
    counts = live[..., 0, :][padding].flatten().bincount(minlength=8)
    assert counts.max() > 2 * counts.float().mean(), "as it is without routing"


@pytest.mark.parametrize("layout", [TENSOR, BOTH, EXPERT], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_named_weights_are_those_of_the_checkpoint(two, folders, family, layout):
    for found in two.all(jobs.weights, folders.of(family), layout):
        assert (found["missing"], found["different"]) == ([], [])
        if family == "qwen3_moe" and "ep_size" in layout:
            # A view of gate and up holds both: one rank's half of the experts, each of twice the size.
            assert found["share"] == 0.5 * 2


@pytest.mark.long
@pytest.mark.parametrize("layout", [dict(fsdp_size=4, ep_size=2), dict(fsdp_size=2, tp_size=2, ep_size=4)], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_named_weights_of_experts_that_fsdp2_shards_too(four, folders, family, layout):
    for found in four.all(jobs.weights, folders.of(family), layout):
        assert (found["missing"], found["different"]) == ([], [])


@pytest.mark.parametrize("layout", [TENSOR, BOTH, EXPERT], ids=str)
def test_clipping_and_optimizer_over_all_placements(two, folders, layout):
    folder = folders.of("qwen3_moe")
    expected = jobs.trained(folder, {})
    assert min(expected["norms"]) > 1, "or nothing is clipped"
    for found in on(two, jobs.trained, folder, layout):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=name)


gathers_adapters = pytest.mark.skipif(not gathers_split_parts(), reason="this torch cannot: refused by name")
LORA = {
    "attention": ["q_proj", "o_proj"],
    "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "one of experts' and attention": ["mlp.experts.gate_up_proj", "q_proj"],
}


@gathers_adapters
@pytest.mark.parametrize("replayed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["replayed", "live"])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.long)])
@pytest.mark.parametrize("adapters", ["experts", pytest.param("attention", marks=pytest.mark.long)])
def test_step_of_adapters(two, folders, adapters, family, checkpointing, replayed):
    check_adapters(two, folders.of(family), EXPERT, adapters, checkpointing, replayed)


@gathers_adapters
@pytest.mark.parametrize("layout", [dict(fsdp_size=4, ep_size=2), dict(fsdp_size=4, ep_size=4)], ids=str)
@pytest.mark.parametrize("adapters", list(LORA))
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.long
def test_step_of_adapters_on_four_ranks(four, folders, family, adapters, layout):
    check_adapters(four, folders.of(family), layout, adapters, True, True)


def check_adapters(ranks, folder, layout, adapters, checkpointing, replayed):
    options = dict(lora=LORA[adapters], checkpointing=checkpointing, replayed=replayed)
    expected = jobs.reference(folder, replayed=replayed, lora=LORA[adapters])
    assert all("lora_" in name and gradient.abs().max() > 1e-4 for name, gradient in expected["grads"].items())
    for found in on(ranks, call, folder, layout, options):
        compare(found, expected)


@gathers_adapters
@pytest.mark.parametrize("adapters", list(LORA))
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.long)])
def test_adapters_are_sent_saved_and_loaded_as_those_of_one_process(two, folders, tmp_path, family, adapters):
    folder, ours, theirs = folders.of(family), str(tmp_path / "ours"), str(tmp_path / "theirs")
    expected = jobs.adapted(folder, {}, LORA[adapters], theirs)
    for loads in (False, True):
        each = on(two, jobs.adapted, folder, EXPERT, LORA[adapters], theirs if loads else ours, loads)
        for found in each:
            assert gap(found["logits"], expected["logits"]) < 2e-5
        for sent in (each[0]["weights"], each[1]["weights"], each[1]["sent_by_last"]):
            assert sent.keys() == expected["weights"].keys()
            assert max(gap(sent[name], weight) for name, weight in expected["weights"].items()) < 1e-6
    saved, ours = (load_file(f"{path}/adapter_model.safetensors") for path in (theirs, ours))
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in saved)


@gathers_adapters
def test_adapters_are_added_once_after_a_forward_that_failed(two, folders):
    for before, after in on(two, jobs.again_after_a_failure, folders.of("qwen3_moe"), EXPERT, LORA["experts"]):
        assert torch.equal(before, after)


@gathers_adapters
def test_clipping_and_optimizer_over_adapters(two, folders):
    folder = folders.of("qwen3_moe")
    expected = jobs.trained(folder, {}, LORA["one of experts' and attention"])
    assert min(expected["norms"]) > 1, "or nothing is clipped"
    for found in on(two, jobs.trained, folder, EXPERT, LORA["one of experts' and attention"]):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=name)


REFUSED = {
    "adapters of experts": ("qwen3_moe", EXPERT, "PEFT adapts experts that expert parallelism spreads over ranks"),
    "adapters that are spread twice": (
        "qwen3_moe",
        EXPERT,
        "experts: spread_adapters was called for this model before",
    ),
    "adapters of a tensor parallel model": ("qwen3_moe", TENSOR, "load_expert_parallel spread.*got tp_size=2"),
    "no adapters": (
        "qwen3_moe",
        EXPERT,
        "expected a model with adapters of PEFT, got .*Qwen3MoeForCausalLM without any",
    ),
    "other adapters of experts": (
        "qwen3_moe",
        EXPERT,
        r"experts: expected LoRA of the experts' .*got ParamWrapper of PEFT",
    ),
    "slices of tensor parallel rows": ("qwen3_moe", TENSOR, "need the same tokens: its rows cannot be sliced"),
    "torch 2.11.0": ("qwen3_moe", TENSOR, r"torch 2\.11\.0 cannot gather fused weights"),
    "joined weights": ("kimi_linear", dict(fsdp_size=2), r"kimi_linear.*transformers 5.*fsdp_size=2.*another order"),
}
if gathers_split_parts():
    spread = "experts: spread_adapters was called for this model before"
    REFUSED["adapters that are spread twice"] = ("qwen3_moe", EXPERT, spread)
if CHOOSES:  # older ones are right
    REFUSED["masked eager experts"] = ("gpt_oss", BOTH, "eager experts fail where those of other ranks are masked")


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_would_be_wrong_is_refused_by_name(two, folders, what):
    family, layout, message = REFUSED[what]
    for found in two.all(jobs.refusal, folders.of(family), layout, what):
        assert found is not None
        assert re.search(message, found, re.DOTALL)


@pytest.mark.parametrize("release", ["5.9.0", "5.16.1"])
def test_experts_that_an_old_release_spreads_are_refused(folders, monkeypatch, release):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.of("qwen3_moe"))
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)  # 5.9 has no sizes
    monkeypatch.setattr("transformers.__version__", release)
    with pytest.raises(
        r3.UnsupportedModelError, match=rf"transformers {release}.*gradients of routers.*5\.17 or later"
    ):
        r3.attach(model)
    model.config.distributed_config.enable_expert_parallel = False
    r3.attach(model).detach()


COMPILED = {
    "layers": dict(compiled="layers"),
    "model": dict(compiled="model"),
    "layers, slices": SLICED | dict(compiled="layers", fused=True),
}
if gathers_split_parts():
    COMPILED["layers, adapters"] = dict(compiled="layers", lora=LORA["experts"])


@pytest.mark.long
@pytest.mark.parametrize("how", list(COMPILED))
def test_compiled(two, folders, how):
    """Layers are compiled in pieces, around what FSDP2 does and the exchange of tokens."""
    folder, options = folders.of("qwen3_moe"), COMPILED[how]
    expected = jobs.reference(folder, replayed=True, lora=options.get("lora", ()))
    found = on(two, call, folder, EXPERT, options, timeout_s=300.0)
    assert all(one["graphs"] > 0 for one in found)
    compare(found[0], expected)


def call(folder, layout, options):
    """Runs on each rank."""
    return jobs.step(folder, layout, **options)
