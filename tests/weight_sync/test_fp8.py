"""FP8 in blocks: the numbers against a float64 reference, the names against what vLLM's own models declare.

The test with an engine needs a GPU that computes in FP8 (H100):

    python -m pytest tests/weight_sync/test_fp8.py -m gpu
"""

import json
import os

import pytest
import torch
from models import VOCAB, tiny_moe
from ranks import Ranks
from safetensors.torch import save_file
from torch import nn
from vllm_models import config_of, declared, vllm_model
from zoo.families import CASES

from r3.errors import SyncError
from r3.weight_sync.quantization.fp8 import block_quantise, fp8_scheme, quantised
from r3.weight_sync.weights.named import gathered, named_weights
from r3.weight_sync.worker.finite import check_finite_engine

BLOCK = (128, 128)
QUANTIZATION = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
SIZES = dict(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    head_dim=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    mlp_only_layers=[0],
)
IGNORED = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "model.layers.0.self_attn.o_proj"]

# All finite e4m3 numbers, ascending.
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()


def reference(weight: torch.Tensor, block: tuple[int, int], power_of_two: bool):
    """In float64, a block at a time: (numbers, scales), numbers chosen from the list of all that there are."""
    weight = weight.double()
    rows, columns = weight.shape
    numbers = torch.empty_like(weight)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = weight[part].abs().max()
            scale = largest / 448 if largest else torch.ones((), dtype=torch.float64)
            if power_of_two:
                scale = 2 ** scale.log2().ceil()
            scales[i, j] = scale
            distance = (weight[part][..., None] / scale - E4M3).abs()
            numbers[part] = E4M3[distance.argmin(-1)]
    return numbers, scales


def spread(scales: torch.Tensor, like: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    whole = scales.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., : like.shape[-2], : like.shape[-1]]


@pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((16, 24), (8, 8)), ((17, 30), (8, 16)), ((5, 3), (8, 8)), ((1, 200), BLOCK), ((130, 9), BLOCK)],
)
def test_numbers(shape, block, dtype, power_of_two):
    torch.manual_seed(sum(shape))
    weight = (torch.randn(shape) * torch.logspace(-6, 3, shape[1])).to(dtype)
    numbers, scales = block_quantise(weight, block, power_of_two=power_of_two)
    assert (numbers.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (numbers.shape, scales.shape) == (weight.shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    expected, exact = reference(weight, block, power_of_two)
    assert ((scales.double() - exact).abs() <= 2**-24 * exact).all()
    if power_of_two:
        assert torch.equal(scales.double(), exact)
    # A quotient may round the other way where it is within float32's rounding of the middle of two numbers.
    error = (weight.double() - numbers.double() * spread(scales, weight, block)).abs()
    best = (weight.double() - expected * spread(scales, weight, block)).abs()
    assert (error <= best * (1 + 1e-5)).all()
    # Half the distance of neighbours: at the largest of the block, and at each number itself.
    scale = spread(scales, weight, block)
    assert (error <= 16 * scale * (1 + 2**-22)).all()
    own = 2.0 ** (weight.double() / scale).abs().clamp(min=2**-6).log2().floor().clamp(max=8) / 16
    assert (error <= own * scale * (1 + 2**-22) + 448 * 2**-24 * scale).all()
    assert error.max() > 0


def test_unusual_blocks():
    weight = torch.zeros(8, 40)
    weight[:, 8:16] = 448.0  # exactly the largest number
    weight[0, 16] = 1e-44  # subnormal in float32, and zero once divided by 448
    weight[:, 24:32] = 3e38
    weight[2, 32] = 2.0**-20
    for power_of_two in (False, True):
        numbers, scales = block_quantise(weight, (8, 8), power_of_two=power_of_two)
        assert scales.isfinite().all()
        assert (scales > 0).all()
        assert scales[0, 0] == 1.0
        assert scales[0, 1] == 1.0
        back = numbers.double() * spread(scales, weight, (8, 8))
        assert back.isfinite().all()
        assert (back[:, :8] == 0).all()
        assert torch.equal(back[:, 8:16].float(), weight[:, 8:16])
        assert ((back - weight).abs() <= 16 * spread(scales, weight, (8, 8))).all()
    assert block_quantise(torch.tensor([[448.0 * 2**-5]]), BLOCK, power_of_two=True)[1].item() == 2.0**-5
    assert block_quantise(torch.tensor([[449.0 * 2**-5]]), BLOCK, power_of_two=True)[1].item() == 2.0**-4
    assert not block_quantise(torch.tensor([[float("nan"), 1.0]]), BLOCK)[1].isfinite().all()
    assert not block_quantise(torch.tensor([[float("inf"), 1.0]]), BLOCK)[1].isfinite().all()


def test_stack_is_its_matrices():
    weight = torch.randn(3, 20, 30)
    numbers, scales = block_quantise(weight, (8, 8))
    for index in range(3):
        alone = block_quantise(weight[index], (8, 8))
        assert torch.equal(numbers[index].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scales[index], alone[1])


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])
def test_a_gpu_makes_the_cpus_bits(power_of_two):
    """torch 2.11 on CUDA multiplies by the rounded reciprocal where the CPU divides by a Python number."""
    torch.manual_seed(0)
    weight = (torch.randn(512, 640) * 0.02).bfloat16()
    expected = block_quantise(weight, BLOCK, power_of_two=power_of_two)
    made = block_quantise(weight.cuda(), BLOCK, power_of_two=power_of_two)
    assert torch.equal(made[0].cpu().view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(made[1].cpu(), expected[1])


def bits(named) -> dict[str, torch.Tensor]:
    made = {name: gathered(source) for name, source in named}
    for name, source in named:
        assert (source.shape, source.dtype) == (made[name].shape, made[name].dtype), name
    return {n: t.contiguous().view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for n, t in made.items()}


def test_fused_experts_come_apart():
    model = tiny_moe(torch.bfloat16, moe_intermediate_size=24, num_experts=12)
    config = QUANTIZATION | dict(weight_block_size=[16, 16])
    apart = bits(quantised(named_weights(model), config))
    fused = bits(quantised(named_weights(model, fused_experts=True), config))
    assert apart.keys() == fused.keys()
    assert all(torch.equal(apart[name], fused[name]) for name in apart)
    assert apart["model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"].shape == (2, 2)
    assert apart["model.layers.0.mlp.experts.3.down_proj.weight_scale_inv"].shape == (2, 2)
    ignored = config | dict(modules_to_not_convert=["model.layers.0.mlp.experts.0.up_proj"])
    left = dict(quantised(named_weights(model, fused_experts=True), ignored))
    assert left["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert left["model.layers.1.mlp.experts.0.gate_proj.weight"].dtype == torch.float8_e4m3fn


def test_experts_that_the_checkpoint_has_in_one():
    named = named_weights(CASES["gpt_oss"].build(torch.bfloat16))
    with pytest.raises(SyncError, match=r"experts\.(gate_up|down)_proj: .* not known"):
        quantised(named, QUANTIZATION)
    ignored = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    left = dict(quantised(named, QUANTIZATION | dict(modules_to_not_convert=ignored)))
    assert left["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert left["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn


def test_what_is_left_as_it_is():
    named = quantised(named_weights(tiny_moe(torch.bfloat16, **SIZES)), QUANTIZATION | dict(ignored_layers=IGNORED))
    sources = dict(named)
    left = {name for name, source in named if source.dtype == torch.bfloat16}
    layers = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    expected = {f"model.layers.{layer}.{own}.weight" for layer in range(3) for own in layers}
    expected |= {f"{name}.weight" for name in IGNORED} | {"model.norm.weight", "model.embed_tokens.weight"}
    assert left == expected
    for name, source in named:
        if name.endswith("_scale_inv"):
            assert sources[name.removesuffix("_scale_inv")].dtype == torch.float8_e4m3fn
            assert source.keep_dtype
    without_list = dict(quantised(named_weights(tiny_moe(torch.bfloat16, **SIZES)), QUANTIZATION))
    assert without_list["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert without_list["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn


def test_checkpoint_says_what_is_quantised(tmp_path):
    model = tiny_moe(torch.bfloat16, **SIZES)
    config = QUANTIZATION | dict(ignored_layers=IGNORED)
    expected = bits(quantised(named_weights(model), config))
    save_fp8(model, tmp_path, config)
    for fused in (False, True):
        named = named_weights(model, fused_experts=fused)
        got = bits(quantised(named, QUANTIZATION, checkpoint=tmp_path))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    with pytest.raises(SyncError, match=r"missing:\n  model\.layers\.0\.mlp\.down_proj\.weight"):
        quantised(
            [item for item in named_weights(model) if "layers.0.mlp.down" not in item[0]], config, checkpoint=tmp_path
        )
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(SyncError, match=r"expected a checkpoint with \*_scale_inv"):
        quantised(named_weights(model), config, checkpoint=tmp_path / "plain")


@pytest.mark.parametrize(
    "config",
    [{}, dict(quant_method="awq"), dict(quant_method="fp8"), QUANTIZATION | dict(fmt="e5m2"), tiny_moe().config],
    ids=["none", "awq", "per tensor", "e5m2", "object"],
)
def test_other_quantisation_is_refused(config):
    with pytest.raises(SyncError, match="only FP8 in blocks"):
        quantised([], config)


def test_scheme_of_an_object():
    config = tiny_moe().config
    config.quantization_config = QUANTIZATION | dict(scale_fmt="ue8m0", modules_to_not_convert=["lm_head"])
    scheme = fp8_scheme(config)
    assert (scheme.block, scheme.power_of_two, scheme.ignored) == (BLOCK, True, {"lm_head"})


# --- against vLLM's own models, on the CPU


@pytest.fixture(scope="module")
def process():
    """vLLM's models need a process group, and settings that are global: a process of their own."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def save_fp8(model: nn.Module, folder, config: dict) -> None:
    """A checkpoint in FP8, as the engine loads it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=config)))
    named = quantised(named_weights(model), config)
    save_file({name: gathered(source).contiguous().clone() for name, source in named}, folder / "model.safetensors")


def _loads(folder: str, ignored: list[str], fused: bool) -> str | None:
    """Everything that vLLM declares is loaded, and dequantises to the trainer's weights; nothing else is sent.

    Returns what vLLM says where it has no kernel for this CPU.
    """
    model = tiny_moe(torch.bfloat16, **SIZES)
    config = QUANTIZATION | dict(ignored_layers=ignored)
    named = quantised(named_weights(model, fused_experts=fused), config)
    try:
        engine, load = vllm_model(config_of(folder))
    except ValueError as error:
        if "Failed to find a kernel" not in str(error):
            raise
        return str(error)  # vLLM 0.30 to 0.32 have FP8 kernels for some CPUs alone
    empty = check_finite_engine(engine)
    weights = {n: p for n, p in declared(engine).items() if p.dtype == torch.float8_e4m3fn or "_scale_inv" in n}
    assert {problem.partition(":")[0] for problem in empty} == set(weights), "unloaded memory is not found"
    load([(name, gathered(source)) for name, source in named])
    assert check_finite_engine(engine) == []
    assert {name for name, p in weights.items() if p.dtype == torch.float8_e4m3fn} == {
        name.removesuffix("_scale_inv") for name in weights if name.endswith("_scale_inv")
    }
    layers = model.model.layers
    expected = {
        "model.layers.1.self_attn.qkv_proj.weight": torch.cat(
            [getattr(layers[1].self_attn, f"{part}_proj").weight for part in "qkv"]
        ),
        "model.layers.0.mlp.gate_up_proj.weight": torch.cat(
            [layers[0].mlp.gate_proj.weight, layers[0].mlp.up_proj.weight]
        ),
        "model.layers.2.mlp.experts.routed_experts.w13_weight": layers[2].mlp.experts.gate_up_proj,
        "model.layers.2.mlp.experts.routed_experts.w2_weight": layers[2].mlp.experts.down_proj,
    }
    found = declared(engine)
    for name, weight in expected.items():
        if ignored and "experts" in ignored[-1] and "experts" in name:
            assert torch.equal(found[name], weight)
            continue
        scale = spread(found[name + "_scale_inv"], weight, BLOCK)
        error = (found[name].double() - weight.double() / scale).abs()
        assert error.max() <= 16 * (1 + 2**-20), name
        assert error.mean() < 4, name
    for name in ignored:
        if name + ".weight" in found:
            assert found[name + ".weight"].dtype == torch.bfloat16
    return None


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("more", [[], ["model.layers.2.mlp.experts.1.up_proj"]], ids=["usual", "experts"])
def test_vllm_loads_it(process, tmp_path, more, fused):
    save_fp8(tiny_moe(torch.bfloat16, **SIZES), tmp_path, QUANTIZATION | dict(ignored_layers=IGNORED + more))
    (no_kernel,) = process.all(_loads, str(tmp_path), IGNORED + more, fused, timeout_s=240)
    if no_kernel is not None:
        pytest.skip(no_kernel)


def _agree(prefixes: list[str], lists: list[list[str]]) -> list[str]:
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    wrong = []
    for ignored in lists:
        scheme = fp8_scheme(QUANTIZATION | dict(ignored_layers=ignored))
        for prefix in prefixes:
            is_experts = prefix.endswith(".experts")
            name = f"{prefix}.1.up_proj.weight" if is_experts else f"{prefix}.weight"
            if scheme.holds(name, torch.Size([128, 128])) == is_layer_skipped(prefix, ignored):
                wrong.append(f"{prefix} with {ignored}")
    return wrong


def test_ignored_as_vllm_ignores(process):
    prefixes = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.experts"]
    prefixes += ["model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.down_proj"]
    lists = [[], ["q_proj"], ["model.layers.1"], ["model.layers.1.mlp.experts"], ["experts"]]
    lists += [[prefix] for prefix in prefixes] + [["model.layers.1.mlp.experts.0.gate_proj", "lm_head"]]
    [wrong] = process.all(_agree, prefixes, lists, timeout_s=240)
    assert wrong == []


# --- what is wrong in an engine


def engine_like() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    model.weight_scale_inv = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.register_buffer("k_scale", torch.tensor(1.0))
    model.register_buffer("packed_scale", torch.zeros(2, dtype=torch.int32))
    model.register_buffer("exponents_scale", torch.full((2,), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    model.plain = nn.Parameter(torch.full((2,), torch.nan))
    return model


def test_check_finite_engine():
    assert check_finite_engine(engine_like()) == []
    assert check_finite_engine(nn.Linear(2, 2)) == []

    def broken(name: str, value: float, at: tuple = (0,)) -> list[str]:
        model = engine_like()
        getattr(model, name).view(torch.uint8 if name in ("weight", "exponents_scale") else torch.float32)[at] = value
        return check_finite_engine(model)

    with torch.no_grad():
        assert broken("weight", 0x7F, (1, 2)) == ["weight: holds NaN"]
        assert broken("weight", 0xFF, (1, 2)) == ["weight: holds NaN"]
        assert broken("weight_scale_inv", torch.nan) == ["weight_scale_inv: holds NaN or infinity"]
        assert broken("weight_scale_inv", torch.inf) == ["weight_scale_inv: holds NaN or infinity"]
        assert broken("weight_scale_inv", 0.0, (1, 1)) == ["weight_scale_inv: holds a scale of zero"]
        assert broken("k_scale", torch.nan, ()) == ["k_scale: holds NaN or infinity"]
        assert broken("exponents_scale", 0xFF) == ["exponents_scale: holds NaN"]
        layers = nn.Sequential(*[engine_like() for _ in range(4)])
        layers[2].k_scale.fill_(torch.nan)
        assert check_finite_engine(layers) == ["2.k_scale: holds NaN or infinity"]


# --- a real engine


def _log_probabilities(llm) -> torch.Tensor:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [
        TokensPrompt(
            prompt_token_ids=torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(s)).tolist()
        )
        for s in range(4)
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return torch.tensor(
        [[next(iter(token.values())).logprob for token in output.prompt_logprobs[1:]] for output in outputs]
    )


def _engine(folder):
    from vllm import LLM

    from r3.weight_sync import WORKER_EXTENSION

    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        gpu_memory_utilization=0.2,
        worker_extension_cls=WORKER_EXTENSION,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_sync_into_an_fp8_engine(tmp_path, fused):
    """After a sync the engine is as one that was started from the same weights."""
    from r3.weight_sync import WeightSync

    model = tiny_moe(torch.bfloat16, **SIZES).cuda()
    config = QUANTIZATION | dict(modules_to_not_convert=IGNORED)
    save_fp8(model, tmp_path / "old", config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator("cuda").manual_seed(index)
            noise = torch.randn(parameter.shape, generator=generator, device="cuda", dtype=torch.float32)
            parameter += (0.5 * parameter.float().std().nan_to_num(0.1) * noise).to(parameter.dtype)
    save_fp8(model, tmp_path / "new", config)

    llm = _engine(tmp_path / "new")
    expected = _log_probabilities(llm)
    llm.llm_engine.engine_core.shutdown()

    llm = _engine(tmp_path / "old")
    try:
        before = _log_probabilities(llm)
        sync = WeightSync(llm, dtype=torch.bfloat16, chunk_bytes=1 << 20)
        named = quantised(named_weights(model, fused_experts=fused), config, checkpoint=tmp_path / "old")
        receipt = sync.push(named, version=1)
        assert receipt.tensors == len(named)
        after = _log_probabilities(llm)
        sync.push(named, version=2)
        again = _log_probabilities(llm)
        sync.close()
    finally:
        llm.llm_engine.engine_core.shutdown()
    print(f"old to new {(before - expected).abs().max():.4f}, synced {(after - expected).abs().max():.2e}", os.getpid())
    assert (before - expected).abs().max() > 0.05
    assert (after - expected).abs().max() < 1e-3
    assert torch.equal(again, after)
