"""What a batch-invariant engine's worker has of r3: norms after the sum, gates that sum in one order."""

import sys
from importlib import import_module

import engine_kernels
import pytest
import torch

import r3
from r3.capture import engine_kwargs
from r3.vllm_compat import float32_product

NAME = "r3.vllm_compat.invariant_worker"


@pytest.fixture
def worker(monkeypatch):
    """The module, as a worker imports it; vLLM is left as it was."""
    from vllm.model_executor.layers import layernorm
    from vllm.model_executor.models.glm4_moe import Glm4MoE

    monkeypatch.setattr(layernorm, "rms_norm_batch_invariant", engine_kernels.rms_norm)
    monkeypatch.setattr(Glm4MoE, "__init__", lambda self: setattr(self, "gate", torch.nn.Linear(16, 4, bias=False)))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield import_module(NAME)
    del sys.modules[NAME]


def test_a_norm_with_a_residual_is_the_norm_of_the_rounded_sum(worker, monkeypatch):
    from vllm import envs
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(16, eps=1e-6, dtype=torch.bfloat16)
    norm.weight.data.uniform_(0.5, 1.5)
    x, residual = torch.randn(2, 5, 16).bfloat16()
    expected = engine_kernels.rms_norm(x + residual, norm.weight, 1e-6)
    found, total = norm.forward_cuda(x.clone(), residual.clone())
    assert torch.equal(found, expected)
    assert torch.equal(total, x + residual)
    assert torch.equal(norm.forward_cuda(x), engine_kernels.rms_norm(x, norm.weight, 1e-6))


def test_a_gate_in_float32_sums_in_one_order_and_has_the_weights_of_now(worker, monkeypatch):
    from vllm.model_executor.models.glm4_moe import Glm4MoE

    monkeypatch.setattr(float32_product, "float32_product", lambda x, weight: x @ weight.t() + 1)
    layer = Glm4MoE.__new__(Glm4MoE)
    torch.nn.Module.__init__(layer)
    layer.__init__()
    x = torch.randn(3, 16)
    layer.gate.weight = torch.nn.Parameter(torch.randn(4, 16))  # as a sync may replace it
    assert torch.equal(layer.gate(x), x @ layer.gate.weight.t() + 1)


def test_the_engine_of_matched_numerics_loads_it_beside_the_weight_sync(worker, tmp_path):
    name = engine_kwargs(r3.R3Config.from_overrides(["trainer.policy.numerics=matched"]))["worker_extension_cls"]
    module, _, attribute = name.rpartition(".")
    made = getattr(import_module(module), attribute)
    assert issubclass(made, worker.InvariantWorker)
    assert issubclass(made, import_module("r3.weight_sync.worker").WeightSyncWorker)


def test_a_vllm_whose_norms_call_something_else_is_refused(worker, monkeypatch):
    from vllm.model_executor.layers import layernorm

    monkeypatch.delattr(layernorm, "rms_norm_batch_invariant")
    monkeypatch.delitem(sys.modules, NAME)
    with pytest.raises(r3.ConfigError, match="cannot be made batch-invariant"):
        import_module(NAME)
    sys.modules[NAME] = worker
