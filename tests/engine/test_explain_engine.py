"""`r3 explain` on what a real engine sampled, through the real command line."""

import json
import os
import subprocess
import sys

import pytest
from faulty_rollouts import demo_model, demo_prompts
from places import DEMO_MODEL, ROOT

import r3
from r3.capture import SamplingSettings, collect, engine_kwargs, sampling_kwargs, save_rollouts

pytestmark = [pytest.mark.engine, pytest.mark.long]


def settings(temperature: float) -> r3.R3Config:
    return r3.R3Config.from_overrides(
        [f"generator.sampling_params.temperature={temperature}", "generator.n_samples_per_prompt=2"],
        {"trainer.policy.model.path": str(DEMO_MODEL)},
    )


@pytest.fixture(scope="module")
def spec():
    return r3.attach(demo_model()).spec


def sampled(engine, spec, temperature: float, seed: int):
    from vllm import SamplingParams

    # Not the requests' seed: all would then draw the same random numbers, and their tokens not be independent.
    prompts = [{"prompt_token_ids": ids} for ids in demo_prompts(64, seed)]
    config = settings(temperature)
    outputs = engine.generate(prompts, SamplingParams(**sampling_kwargs(config)), use_tqdm=False)
    return collect(outputs, spec), config


def compared(file) -> tuple[int, dict]:
    command = [sys.executable, "-m", "r3.cli", "explain", "--model", str(DEMO_MODEL), "--rollout", str(file), "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


def names(told: dict) -> list[str]:
    return [cause["name"] for cause in told["causes"]]


def test_routing_and_precision_explain_a_real_engine_and_a_temperature_is_named(engine, spec, tmp_path):
    rollouts, config = sampled(engine, spec, 1.0, 11)
    status, told = compared(save_rollouts(rollouts, tmp_path / "a", settings=SamplingSettings.of(config)))
    assert (status, told["wrong"], set(names(told)) <= {"routing", "precision"}) == (0, False, True), told
    assert told["k3"]["replayed"] < told["k3"]["live"] / 2
    warm, config = sampled(engine, spec, 0.7, 12)
    status, told = compared(save_rollouts(warm, tmp_path / "b", settings=SamplingSettings.of(config)))
    assert (status, set(names(told)) <= {"routing", "precision"}) == (0, True), told
    status, told = compared(save_rollouts(warm, tmp_path / "c"))
    assert status == 1
    assert [name for name in names(told) if name not in ("routing", "precision")] == ["temperature"], told
    figures = next(cause["figures"] for cause in told["causes"] if cause["name"] == "temperature")
    assert figures["temperature"] == pytest.approx(0.7, rel=0.02)


def test_an_engine_with_raw_log_probabilities_is_named(spec, tmp_path):
    from vllm import LLM

    kwargs = engine_kwargs(settings(0.7)) | {"logprobs_mode": "raw_logprobs"}
    llm = LLM(**kwargs)
    try:
        rollouts, config = sampled(llm, spec, 0.7, 13)
    finally:
        llm.llm_engine.engine_core.shutdown()
    # Also where the file believes that they are processed.
    for said in (SamplingSettings.of(config), None):
        status, told = compared(save_rollouts(rollouts, tmp_path / "a", settings=said))
        assert status == 1
        assert [name for name in names(told) if name not in ("routing", "precision")] == ["raw_logprobs"], told
