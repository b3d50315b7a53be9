"""A model's head that scores tokens by itself: every family, copies, adapters, and under FSDP2 and Ulysses."""

import contextlib
import copy
import functools

import parallel_jobs as jobs
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from zoo import CASES

import r3
from r3 import ParallelError
from r3.parallel import fused_head, make_mesh, shard_parameters, token_logprobs

TEMPERATURE = 0.7
# What each does to its head's product; the others leave it as it is.
AFTER = {
    "granitemoe": dict(logits_scaling=4.0),
    "cohere2_moe": dict(logit_scale=0.0625),
    "phimoe": dict(lm_head_bias=True),
    "inkling2": dict(unpadded_vocab_size=60),
    "muse_spark": {},
    "gemma4": dict(final_logit_softcapping=5.0),
}
# An entry of this gradient of deepseek_v4 is 4e-5 of the largest, and differs by 5e-5 of that in float32 and by 3e-5 in
# float64: most likely a sum that cancels, which the model computes in float32 always.
NOISE = {"model.layers.0.attn_hc.scale": 1e-4}
REFUSED = {
    "nllb_moe": "could not be found out",
    "switch_transformers": "could not be found out",
}
# Its forward begins with random tokens; gradients of one that changes what it needs for them.
NOT_COMPARED = ("diffusion_gemma", "doge")
QUICK = ("beam", "deepseek_v3", "granitemoe", "muse_spark", "olmoe", "qwen3_moe")


def scored(model, inputs, labels, head=None):
    """Log-probabilities of `labels` and all gradients of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    if head is not None:
        logprobs = head.logprobs(model, labels, temperature=TEMPERATURE, **inputs)
    else:
        logprobs = token_logprobs(model(**inputs).logits, labels, temperature=TEMPERATURE)
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def labels_for(inputs, vocabulary):
    shape = inputs["input_ids"].shape
    labels = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(3))
    labels[:, :3] = -100
    return labels


def require_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        atol = NOISE.get(name, 1e-5) * float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=atol, msg=name)


def every_model():
    """Together they take a minute. Always tried: plain heads, and logits that are scaled or capped."""
    for name in CASES:
        if name not in (*REFUSED, *NOT_COMPARED):
            yield pytest.param(name, marks=() if name in QUICK else pytest.mark.long)


@pytest.mark.parametrize("name", every_model())
def test_every_model_gives_the_log_probabilities_and_gradients_of_its_logits(name):
    case = CASES[name]
    model, inputs = case.build(text=AFTER.get(name)), case.inputs(2, 8)
    logits = model(**inputs).logits
    labels = labels_for(inputs, logits.shape[-1])
    expected = scored(model, inputs, labels)
    head = fused_head(model)
    assert torch.equal(model(**inputs).logits, logits)
    require_equal(scored(model, inputs, labels, head), expected)
    scores = head.scores(model, labels, temperature=TEMPERATURE, **inputs)
    assert torch.equal(scores.logprobs, head.logprobs(model, labels, temperature=TEMPERATURE, **inputs))
    p = (logits / TEMPERATURE).softmax(-1)
    torch.testing.assert_close(scores.entropy, -(p * p.log()).sum(-1) * (labels >= 0), rtol=1e-5, atol=1e-5)
    head.detach()
    assert torch.equal(model(**inputs).logits, logits)


def test_what_comes_after_the_head_is_found_out():
    found = {name: fused_head(CASES[name].build(text=text)).after for name, text in AFTER.items()}
    assert {name: (after.scale, after.softcap, after.vocabulary) for name, after in found.items()} == {
        "granitemoe": (0.25, None, 64),
        "cohere2_moe": (0.0625, None, 64),
        "phimoe": (1.0, None, 64),
        "inkling2": (1.0, 30.0, 60),
        "muse_spark": (pytest.approx(0.7), 20.0, 64),
        "gemma4": (pytest.approx(1.0), 5.0, 64),
    }


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_that_is_no_causal_decoder_is_refused(name):
    with pytest.raises(ParallelError, match=REFUSED[name]) as caught:
        fused_head(CASES[name].build())
    assert "token_logprobs" in str(caught.value)


class Shifted(type(CASES["qwen3_moe"].build())):
    """Adds a number of its own to each logit."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_a_model_that_changes_its_logits_otherwise_is_refused():
    model = CASES["qwen3_moe"].build()
    model.__class__ = Shifted
    with pytest.raises(ParallelError, match="Shifted changes its head's product in a way that is not known here"):
        fused_head(model)


class LowRank(nn.Linear):
    """A linear layer with a product of two small matrices beside it, as adapters have."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden[..., :2] @ self.weight[:, :2].t()


def test_a_head_that_is_more_than_its_weight_is_refused():
    model = CASES["qwen3_moe"].build()
    model.lm_head.__class__ = LowRank
    with pytest.raises(ParallelError, match=r"forward of nn\.Linear, got .*LowRank.*target_modules, or merge it first"):
        fused_head(model)


def test_lora_elsewhere_is_scored_and_lora_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    case = CASES["qwen3_moe"]
    inputs = case.inputs(2, 8)
    labels = labels_for(inputs, 64)
    model = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = scored(model, inputs, labels)
    require_equal(scored(model, inputs, labels, fused_head(model)), expected)
    model = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ParallelError, match=r"got peft\..*leave the head out of target_modules"):
        fused_head(model)
    model = case.build()
    head = fused_head(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ParallelError, match="did an adapter wrap its head since"):
        head.logprobs(model, labels, **inputs)


def test_an_adapter_that_comes_later_is_seen():
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    head = fused_head(model)

    class Beside(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(32, 64)

        def forward(self, hidden):
            return self.base(hidden) + self.down(hidden)

    model.set_output_embeddings(Beside(model.lm_head))
    with pytest.raises(ParallelError, match=r"expected the head's \[2, 8, 1\] as logits.*did an adapter wrap"):
        head.logprobs(model, labels_for(inputs, 64), **inputs)


def test_labels_of_other_positions_are_refused():
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    head, labels = fused_head(model), labels_for(inputs, 64)
    with pytest.raises(ParallelError, match=r"labels: expected \[B, S\] = \[2, 8\]"):
        head.logprobs(model, labels[:, 1:], **inputs)
    with pytest.raises(ParallelError, match=r"\[2, 1\], the positions of which the model computes logits"):
        head.logprobs(model, labels, logits_to_keep=1, **inputs)
    assert model(**inputs).logits.shape == (2, 8, 64)  # an error leaves nothing behind


def test_copies_and_saved_models_return_logits_and_a_detached_handle_says_so(tmp_path):
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    logits, head, labels = model(**inputs).logits, fused_head(model), labels_for(inputs, 64)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, logits)
    with pytest.raises(ParallelError, match="its head did not run"):
        head.logprobs(copied, labels, **inputs)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(**inputs).logits, logits)
    head.detach()
    head.detach()
    with pytest.raises(ParallelError, match="detached"):
        head.logprobs(model, labels, **inputs)
    found, expected = fused_head(model).logprobs(model, labels, **inputs), token_logprobs(logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_takes_a_handle_of_its_own_and_a_head_takes_one(tmp_path):
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    logits, head, labels = model(**inputs).logits, fused_head(model), labels_for(inputs, 64)
    with pytest.raises(ParallelError, match="its head has a handle already"):
        fused_head(model)
    expected = head.logprobs(model, labels, **inputs)
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        own = fused_head(copied)
        assert torch.equal(own.logprobs(copied, labels, **inputs), expected)
        assert torch.equal(head.logprobs(model, labels, **inputs), expected)
        own.detach()
        assert torch.equal(copied(**inputs).logits, logits)
    head.detach()
    assert "forward" not in model.lm_head.__dict__


def test_hooks_of_accelerate_may_come_and_go():
    accelerate = pytest.importorskip("accelerate")
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    labels = labels_for(inputs, 64)
    expected = token_logprobs(model(**inputs).logits, labels)
    for first in (False, True):
        if first:
            accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
        head = fused_head(model)
        if not first:
            accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
        torch.testing.assert_close(head.logprobs(model, labels, **inputs), expected, rtol=1e-5, atol=1e-5)
        accelerate.hooks.remove_hook_from_module(model.lm_head)
        torch.testing.assert_close(head.logprobs(model, labels, **inputs), expected, rtol=1e-5, atol=1e-5)
        head.detach()
        torch.testing.assert_close(token_logprobs(model(**inputs).logits, labels), expected)


def test_after_replay_is_attached_rows_are_replayed():
    case = CASES["qwen3_moe"]
    model, inputs = case.build(), case.inputs(2, 8)
    with r3.record(model) as recorder:
        expected = token_logprobs(model(**inputs).logits, labels_for(inputs, 64))
    replay = r3.attach(model)
    head = fused_head(model)
    found = head.logprobs(model, labels_for(inputs, 64), routed_experts=recorder.routing, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert replay.last.rows_replayed == 16


# Under FSDP2 and Ulysses.


@pytest.fixture(scope="module")
def one(device):
    with contextlib.closing(Ranks(1, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two(device):
    with contextlib.closing(Ranks(2, device)) as ranks:
        yield ranks


@functools.cache
def reference(family, tied):
    return jobs.reference(family, tied=tied)


def step(family, options):
    """Runs on each rank."""
    return jobs.step(family, device=device_of_ranks(), fused=True, **options)


def device_of_ranks():
    return "cuda" if "nccl" in dist.get_backend_config() else "cpu"


def off(found, expected):
    """What differs by 2e-5 of its largest value, or more."""
    assert found["grads"].keys() == expected["grads"].keys()
    pairs = {name: (found["grads"][name], gradient) for name, gradient in expected["grads"].items()}
    pairs["logprobs"] = found["logprobs"], expected["logprobs"]
    pairs["loss"] = tuple(torch.tensor(side["loss"]) for side in (found, expected))
    gaps = {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for name, (a, b) in pairs.items()}
    return {name: gap for name, gap in gaps.items() if not gap < 2e-5}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", [dict(), dict(layout="padded"), dict(checkpointing=True)], ids=str)
def test_fsdp2_in_one_process(one, how, tied):
    found = one.all(step, "softmax", dict(fsdp=True, tied=tied, **how))[0]
    assert not off(found, reference("softmax", tied))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", [dict(fsdp=True), dict(sequence=2, fsdp=True), dict(sequence=2)], ids=str)
def test_two_ranks(two, how, checkpointing, tied):
    found = two.all(step, "softmax", dict(checkpointing=checkpointing, tied=tied, **how))[0]
    assert not off(found, reference("softmax", tied))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("late", [False, True], ids=["before it shards", "after"])
def test_scores_are_of_float32_logits_where_fsdp2_computes_in_bfloat16(two, tied, late):
    for fused, plain in two.all(errors_in_bfloat16, tied, late):
        assert fused < 1e-5 < 1e-3 < plain


def errors_in_bfloat16(tied, late):
    """Of log-probabilities, from those of float64 logits of the same values: fused, and from the model's logits."""
    device = device_of_ranks()
    model = jobs.build("softmax", tied=tied)[0].to(device)
    weight = model.lm_head.weight.detach().bfloat16().double()
    head = None if late else fused_head(model)
    model = shard_parameters(model, make_mesh(device), param_dtype=torch.bfloat16).eval()
    head = head or fused_head(model)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    inputs = {"input_ids": torch.arange(2, 42, device=device).view(2, 20), "use_cache": False}
    labels = labels_for(inputs, 64).to(device)
    with torch.no_grad():
        fused = head.logprobs(model, labels, **inputs)
        plain = token_logprobs(model(**inputs).logits, labels)
    exact = (seen[0] @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    return [float((found - exact).abs().max()) for found in (fused, plain)]
