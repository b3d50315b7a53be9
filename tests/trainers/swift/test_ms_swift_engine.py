"""swift's GRPO pipeline with r3's trainer and the vLLM engine that swift starts in its process: nothing stands in."""

import pytest
from swift_runs import run
from trainers.conformance import EQUAL

from trainer_hooks.ms_swift import engine

pytestmark = pytest.mark.engine


def test_a_run_with_its_engine(tmp_path, monkeypatch):
    """swift's own sync cannot reload this engine on a CPU; r3's can. Replay lowers the gap to a third."""
    pytest.importorskip("vllm")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("VLLM_PLUGINS", "")  # those of swift want torchvision
    made = run(
        tmp_path,
        trainer="RealGRPO",
        vllm_engine_kwargs={"kv_cache_memory_bytes": 100_000_000},
        vllm_max_model_len=128,
        use_cpu=False,
        ddp_backend="gloo",
        num_iterations=2,
        max_steps=4,
        learning_rate=1e-3,
    )
    scored = [each for each in made.scored if each["training"]]
    assert sum(each["in_loss"] for each in scored) == 8
    assert max(each["replayed"] for each in scored) < EQUAL
    assert min(each["live"] for each in scored) > 10 * EQUAL
    sampled = [each["gaps"] for each in scored if not each["in_loss"]]
    replayed, live = (sum(each[name] for each in sampled) / len(sampled) for name in ("replayed", "live"))
    assert replayed < live / 3
    assert made._sync.version == 2  # one a generation
    assert engine.as_llm(made.engine.engine).collective_rpc("r3_status")[0]["state"] == "idle"
