"""Norms by Liger's kernels: those of one model alone, with the model's own results."""

import copy

import pytest
import torch
from places import DEMO_MODEL

import r3
from trainer_hooks.liger import use_liger_norms


def test_a_model_on_a_cpu_is_refused():
    from transformers import AutoModelForCausalLM

    with pytest.raises(r3.ConfigError, match=r"use_liger_kernel=true.*need a GPU"):
        use_liger_norms(AutoModelForCausalLM.from_pretrained(DEMO_MODEL))


@pytest.fixture
def on_meta(monkeypatch):
    """Liger asks for no GPU where nothing is computed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    pytest.importorskip("liger_kernel")
    return lambda config: AutoModelForCausalLM.from_config(config).to("meta"), AutoConfig.from_pretrained(DEMO_MODEL)


def test_the_norms_of_one_model_are_changed_and_nothing_else(on_meta):
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    make, config = on_meta
    before = dict(vars(modeling_qwen3_moe))
    model = make(config)
    assert use_liger_norms(model) == 4 * config.num_hidden_layers + 1
    assert {name for name, value in vars(modeling_qwen3_moe).items() if before.get(name) is not value} == set()
    # The experts, the head and the model's own forward stay.
    changed = {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}
    assert changed == {"Qwen3MoeRMSNorm"}


def test_a_model_that_liger_does_not_know_is_refused(on_meta):
    from transformers import OlmoeConfig

    make, _ = on_meta
    config = OlmoeConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(r3.UnsupportedModelError, match="no norms for OlmoeForCausalLM"):
        use_liger_norms(make(config))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_are_the_models_own(dtype, bound):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype).cuda()
    replay = [r3.attach(plain)]
    liger = copy.deepcopy(plain)
    use_liger_norms(liger)
    ids = torch.randint(2, 300, (2, 64), device="cuda")
    with torch.no_grad(), r3.record(plain) as recorder:
        plain(input_ids=ids, use_cache=False)
    found = []
    for model in (plain, liger):
        logits = model(input_ids=ids, use_cache=False, routed_experts=recorder.routing).logits.float()
        logits.log_softmax(-1)[..., 5].sum().backward()
        found.append((logits.detach(), *(p.grad.float() for p in model.parameters() if p.grad is not None)))
    assert replay
    for mine, own in zip(*found, strict=True):
        assert float((mine - own).norm() / own.norm()) < bound
