"""Settings -> the arguments that a vLLM engine and its sampling need for capture."""

from typing import Any

from r3.config import R3Config
from r3.errors import ConfigError

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"


def engine_kwargs(config: R3Config) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM`: capture on, sampled log-probabilities as the trainer computes them, sync ready.

    Raises:
        ConfigError: replay is switched on while capture is switched off.
    """
    from vllm.platforms import current_platform

    engine = config.generator.inference_engine
    config.check()
    kwargs: dict[str, Any] = {
        "model": config.trainer.policy.model.path,
        "dtype": engine.dtype,
        "seed": config.trainer.seed,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enable_return_routed_experts": engine.enable_return_routed_experts,
        "enforce_eager": engine.enforce_eager,
        # Those of the distribution that was sampled from, temperature included; not the raw logits'.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        if engine.enable_return_routed_experts and not engine.enforce_eager:
            raise ConfigError(
                "generator.inference_engine.enforce_eager=false: vLLM's compiled CPU mode returns routing of zeros; "
                "set it to true"
            )
        kwargs["kv_cache_memory_bytes"] = int(engine.cpu_kv_cache_gib * 2**30)
    else:
        kwargs["gpu_memory_utilization"] = engine.gpu_memory_utilization
    return kwargs


def sampling_kwargs(config: R3Config) -> dict[str, Any]:
    """Keyword arguments for `vllm.SamplingParams`: the whole distribution at the set temperature, with log-probabilities."""
    sampling = config.generator.sampling_params
    return {
        "n": config.generator.n_samples_per_prompt,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": sampling.max_generate_length,
        "logprobs": 0,
    }
