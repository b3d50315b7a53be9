"""Memory for keys and values: what the settings say, on the CPU and on a GPU."""

from types import SimpleNamespace

import pytest

import r3
from r3.capture import engine_kwargs

SIZE = "generator.inference_engine.kv_cache_gib"


def memory(*overrides: str) -> dict[str, float]:
    kwargs = engine_kwargs(r3.R3Config.from_overrides(overrides))
    return {name: kwargs[name] for name in ("kv_cache_memory_bytes", "gpu_memory_utilization") if name in kwargs}


@pytest.fixture(params=["cpu", "gpu"])
def kind(request, monkeypatch):
    import vllm.platforms
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer  # noqa: F401  (on the platform that there is)

    platform = SimpleNamespace(is_cpu=lambda: request.param == "cpu")
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    return request.param


def test_a_size_is_taken_as_it_is_and_a_gpu_measures_without_one(kind):
    measured = {"gpu_memory_utilization": 0.3} if kind == "gpu" else {}
    assert memory(f"{SIZE}=0.25") == measured | {"kv_cache_memory_bytes": 1 << 28}
    assert memory() == (measured or {"kv_cache_memory_bytes": 1 << 29})
