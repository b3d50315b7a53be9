"""The trainer's forward with the engine's values: the mechanism, with stand-ins for the engine's kernels on a CPU.

What vLLM's own kernels give is seen on a GPU alone (tests/numerics/test_matched_engine.py, benchmarks/gap.py).
"""

import sys
from types import SimpleNamespace

import engine_kernels
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig

import r3
from r3 import ConfigError, ParallelError, ReplayError, UnsupportedModelError
from r3.numerics import match_engine
from r3.parallel import fused_head
from r3.routing import Packing
from r3.sampling_mask import SamplingMask
from r3.vllm_compat import kernels

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=80,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
SIGMOID = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=48,
    routed_scaling_factor=2.5,
    attention_bias=True,
    use_qk_norm=True,
)
LENGTHS = (9, 5, 12)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name in dir(engine_kernels):
        if not name.startswith("_") and callable(getattr(kernels, name, None)) and name != "Tensor":
            monkeypatch.setattr(kernels, name, getattr(engine_kernels, name))
    monkeypatch.setattr(kernels, "require_prepared", lambda: None)


def build(kind="moe", **changes):
    torch.manual_seed(0)
    if kind == "moe":
        config = Qwen3MoeConfig(
            num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, **SIZES | changes
        )
    elif kind == "sigmoid":
        config = Glm4MoeConfig(**SIGMOID | SIZES | changes)
    else:
        config = Qwen3Config(intermediate_size=48, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms of ones and biases of zeros would hide which weight is read
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_()
    return model.to(torch.bfloat16)


def rollouts():
    """Padded ids and mask of three sequences, and random routing `[3, 12, 3, 2]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    routing = torch.rand(3, max(LENGTHS), 3, 8, generator=generator).topk(2).indices
    return ids * mask, mask, routing


def engine_logprobs(model, ids, mask, routing, temperature):
    """`[B, S]` by each sequence alone, entry t of token t + 1; 0 where there is none."""
    found = torch.zeros(ids.shape)
    for row, length in enumerate(mask.sum(1).tolist()):
        chosen = None if routing is None else routing[row, :length]
        hidden = engine_kernels.by_layers(model, ids[row, :length], chosen)
        labels = torch.cat((ids[row, 1:length], torch.tensor([-100])))
        found[row, :length] = engine_kernels.token_logprobs(hidden, model.lm_head.weight, labels, temperature)
    return found


def labels_of(ids, mask):
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return labels


old = Version(transformers.__version__) < Version("5.14")
sigmoid = pytest.param("sigmoid", marks=pytest.mark.skipif(old, reason="refused by name"))


@pytest.mark.parametrize("layout", ["padded", "packed", "checkpointed"])
@pytest.mark.parametrize("kind", ["moe", sigmoid, "dense"])
def test_log_probabilities_are_the_engines_to_the_last_bit(kind, layout):
    assert_engines_logprobs(build(kind), layout)


def assert_engines_logprobs(model, layout="padded"):
    ids, mask, routing = rollouts()
    dense = model.config.model_type == "qwen3"
    replay = None if dense else r3.attach(model)
    head = fused_head(model)
    handle = match_engine(model, head)
    routed = (
        {} if replay is None else {"routed_experts": replay.routing(routing.masked_fill(~mask[..., None, None], -1))}
    )
    inputs = dict(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    labels = labels_of(ids, mask)
    if layout == "packed":
        packing = Packing.from_mask(mask, row_length=24)
        inputs = dict(input_ids=packing.pack(ids), position_ids=packing.position_ids(), use_cache=False)
        labels = packing.pack(labels, fill=-100)
        routed = {name: value.pack(packing) for name, value in routed.items()}
    if layout == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logprobs = head.logprobs(model, labels, temperature=0.7, **inputs, **routed)
    logprobs.sum().backward()
    found = packing.unpack(logprobs) if layout == "packed" else logprobs
    expected = engine_logprobs(model, ids, mask, None if dense else routing, 0.7)
    assert torch.equal(found.detach() * mask, expected)
    assert not handle.unchecked
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(old, reason="refused by name")
def test_weights_of_sigmoids_are_the_engines_also_without_norms_of_queries(monkeypatch):
    """The two sides' weights differ in a last bit, which log-probabilities seldom show: here by 1%."""
    weigh = engine_kernels.sigmoid_weights
    for module in (kernels, engine_kernels):
        monkeypatch.setattr(module, "sigmoid_weights", lambda logits, ids: 1.01 * weigh(logits, ids))
    assert_engines_logprobs(build("sigmoid", use_qk_norm=False))


@pytest.mark.parametrize("kind", ["moe", sigmoid])
def test_gradients_are_the_models_own(kind):
    """But for the rounding of the values that they are taken at, the gate's among them."""
    ids, mask, routing = rollouts()
    gradients = []
    for matched in (False, True):
        model = build(kind)
        replay, head = r3.attach(model), fused_head(model)
        if matched:
            handle = match_engine(model, head)
        logprobs = head.logprobs(
            model, labels_of(ids, mask), input_ids=ids, attention_mask=mask.long(), use_cache=False,
            routed_experts=replay.routing(routing.masked_fill(~mask[..., None, None], -1)),
        )  # fmt: skip
        logprobs.sum().backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
        if matched:
            handle.detach()
    for name, own in gradients[0].items():
        apart = (gradients[1][name] - own).norm() / own.norm()
        assert apart < 0.1, (name, apart)  # of values that differ by rounding
    gate = next(name for name in gradients[0] if name.endswith("gate.weight"))
    assert gradients[1][gate].norm() > 0


def test_sigmoids_are_weighed_by_the_engines_kernel_in_the_order_of_the_ids(monkeypatch):
    """Of the kernel this knows: it chooses by sigmoid and bias, and weighs by sigmoid alone."""

    def grouped_topk(logits, groups, kept_groups, slots, renormalize, scale, bias, scoring):
        assert (groups, kept_groups, renormalize, scale, scoring) == (1, 1, True, 1.0, 1)
        chosen = (logits.sigmoid() + bias).topk(slots).indices
        return engine_kernels.sigmoid_weights(logits, chosen), chosen

    ops = SimpleNamespace(grouped_topk=grouped_topk)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(_custom_ops=ops))
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 8
    ids = torch.rand(50, 16, generator=torch.Generator().manual_seed(3)).topk(5).indices
    assert torch.equal(kernels.sigmoid_weights(logits, ids), engine_kernels.sigmoid_weights(logits, ids))


def test_detached_it_is_what_it_was():
    model = build()
    ids, mask, _ = rollouts()
    inputs = dict(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    before = model(**inputs).logits
    handle = match_engine(model, fused_head(model))
    with pytest.raises(ReplayError, match="attached to this model already"):
        match_engine(model)
    assert not torch.equal(model(**inputs).logits, before)
    handle.detach()
    handle.detach()
    assert torch.equal(model(**inputs).logits, before)


def test_a_block_that_computes_something_else_is_refused_at_its_first_forward(monkeypatch):
    def gemma_norm(x, weight, eps):
        return engine_kernels.rms_norm(x, weight + 1, eps)

    monkeypatch.setattr(kernels, "rms_norm", gemma_norm)
    model = build()
    match_engine(model)
    with pytest.raises(UnsupportedModelError, match=r"input_layernorm .*Qwen3MoeRMSNorm.*relative error"):
        model(input_ids=rollouts()[0], use_cache=False)


def test_what_cannot_be_matched_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"head_dim 64: .*decoding"):
        match_engine(build(head_dim=64))
    if old:
        with pytest.raises(UnsupportedModelError, match=r"outside of the router, from 5\.14 on in it"):
            match_engine(build("sigmoid"))
    with pytest.raises(UnsupportedModelError, match=r"n_group 2: .*groups of experts"):
        match_engine(build("sigmoid", n_group=2))
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob False"):
        match_engine(build("sigmoid", norm_topk_prob=False))
    with pytest.raises(UnsupportedModelError, match="olmoe: expected one of qwen3, qwen3_moe, glm4_moe"):
        match_engine(AutoModelForCausalLM.from_config(_olmoe()))
    ids, mask, _ = rollouts()
    model = build()
    match_engine(model)
    with pytest.raises(ReplayError, match="padding before it"):
        model(input_ids=ids.flip(1), attention_mask=mask.flip(1).long(), use_cache=False)
    wide = build().float()
    match_engine(wide)
    with pytest.raises(ReplayError, match=r"bfloat16 in eager mode, got torch\.float32"):
        wide(input_ids=ids, use_cache=False)


def test_sets_of_a_truncated_distribution_are_refused():
    model = build()
    ids, mask, _ = rollouts()
    head = fused_head(model)
    match_engine(model, head)
    labels = labels_of(ids, mask)
    scored = labels >= 0
    sets = SamplingMask(scored.long(), labels[scored].int())
    with pytest.raises(ParallelError, match="expected no sampling_mask"):
        head.logprobs(model, labels, sampling_mask=sets, input_ids=ids, use_cache=False)


def _olmoe():
    from transformers import OlmoeConfig

    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return OlmoeConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=16, **sizes)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no NVIDIA GPU here"):
        match_engine(build())
