"""The arguments that a vLLM engine and its sampling need for capture, from the settings."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from r3.capture.kept_ids import SPARE
from r3.capture.stop_signals import interruptible_start, terminated_by_exception
from r3.config import R3Config, environment
from r3.entry_points import INVARIANT_WORKER, SCHEDULER, WORKER, WORKER_EXTENSION, joined_extension
from r3.errors import ConfigError
from r3.vllm_compat.capture import capture_backend, rotary_kernel_fails
from r3.vllm_compat.release import warn_of_unseen_vllm

CPU_KV_CACHE_GIB = 0.5


def engine_kwargs(config: R3Config) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM`: capture on, sampled log-probabilities as the trainer computes them, sync ready.

    Raises:
        ConfigError: settings that contradict each other, or under which this vLLM cannot capture.
    """
    from vllm.platforms import current_platform

    engine = config.generator.inference_engine
    config.check()
    captures = engine.enable_return_routed_experts
    kwargs: dict[str, Any] = {
        "model": config.trainer.policy.model.path,
        "dtype": engine.dtype,
        "seed": config.trainer.seed,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "disable_log_stats": True,
    }
    sampling = config.generator.sampling_params
    if sampling.truncated:
        kwargs["max_logprobs"] = sampling.top_k + SPARE
    if current_platform.is_cpu():
        if captures and not engine.enforce_eager:
            raise ConfigError(
                "generator.inference_engine.enforce_eager=false: vLLM's compiled CPU mode returns routing of zeros; "
                "set it to true"
            )
    else:
        kwargs["gpu_memory_utilization"] = engine.gpu_memory_utilization
    size = CPU_KV_CACHE_GIB if engine.kv_cache_gib is None and current_platform.is_cpu() else engine.kv_cache_gib
    if size is not None:
        kwargs["kv_cache_memory_bytes"] = math.ceil(size * 2**30)
    matched = config.trainer.policy.numerics == "matched"
    if matched:
        # Compiled code would round norms in another place; graphs of decoding alone change nothing.
        kwargs["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    more = capture_kwargs(
        pipeline_parallel_size=engine.pipeline_parallel_size,
        worker_extension_cls=INVARIANT_WORKER if matched else None,
        capture=captures,
    )
    return kwargs | {name: value for name, value in more.items() if name != "enforce_eager"}


def capture_kwargs(
    *, pipeline_parallel_size: int = 1, worker_extension_cls: str | None = None, capture: bool = True
) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM` that capture and weight syncs need, and no others.

    For an engine that a trainer makes: merge `hf_overrides` and `compilation_config` with its own, and let the others
    replace its own.

    Args:
        pipeline_parallel_size: of the engine.
        worker_extension_cls: the trainer's own, by its dotted name: vLLM takes one, so r3's is joined with it.
        capture: False leaves out what records routing: for syncs alone.

    Raises:
        ConfigError: this vLLM cannot capture so, or lacks what r3 relies on.
    """
    from vllm.platforms import current_platform

    warn_of_unseen_vllm()
    kwargs: dict[str, Any] = {
        # Log-probabilities of the sampling distribution, temperature included, and not of the raw logits.
        "logprobs_mode": "processed_logprobs",
        # Logits in float32, as the trainer computes them: rounded to bfloat16, they alone are most of the gap.
        "hf_overrides": {"head_dtype": "float32"},
        "worker_extension_cls": joined_extension(worker_extension_cls) if worker_extension_cls else WORKER_EXTENSION,
    }
    if current_platform.is_cpu():
        kwargs["enforce_eager"] = True  # vLLM's compiled CPU mode returns routing of zeros
        if rotary_kernel_fails():
            kwargs["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    if not capture:
        return kwargs | {"enable_return_routed_experts": False}
    way = capture_backend(pipeline_parallel_size=pipeline_parallel_size)
    kwargs["enable_return_routed_experts"] = way != "hooks"
    if way == "hooks":
        kwargs["worker_cls"] = WORKER
    if way != "vllm":
        kwargs["scheduler_cls"] = SCHEDULER
    return kwargs


def sampling_kwargs(config: R3Config) -> dict[str, Any]:
    """Keyword arguments for `vllm.SamplingParams`: the set distribution, with log-probabilities of what was sampled.

    Where top_k, top_p or min_p cut the distribution, with those of all ids that were left, which
    `collect(sampling_mask=True)` reads. Log-probabilities come as one list instead of an object a token, and text is
    not made: both take the engine's time. Decode `Rollout.token_ids` where text is needed.

    Never raises: `R3Config` has checked the settings.

    Example:
        >>> config = R3Config.from_overrides(["generator.sampling_params.temperature=0.7"])
        >>> sampling_kwargs(config)["temperature"], sampling_kwargs(config)["logprobs"]
        (0.7, 0)
    """
    sampling = config.generator.sampling_params
    return {
        "n": config.generator.n_samples_per_prompt,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_generate_length,
        "logprobs": sampling.top_k + SPARE if sampling.truncated else 0,
        "flat_logprobs": True,
        "detokenize": False,
    }


def is_truncated(sampling: Mapping[str, Any]) -> bool:
    """Whether requests with these `vllm.SamplingParams` sample from less than the whole vocabulary."""
    cut = sampling.get("top_k", 0) > 0 or sampling.get("top_p", 1) < 1 or sampling.get("min_p", 0) > 0
    return cut and sampling.get("temperature", 1) > 0


@contextlib.contextmanager
def running_engine(config: R3Config) -> Iterator[Any]:
    """A `vllm.LLM` of the settings, whose processes end when the context is left; it has none with `in_process`.

    Also by an exception, by Ctrl-C, or by SIGTERM, which in this context raises SystemExit(143): without that, Python
    would end at once and leave the engine's processes running. Ctrl-C and SIGTERM end its start as well.
    """
    from vllm import LLM

    in_process = config.generator.inference_engine.in_process
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if in_process else {}
    if config.trainer.policy.numerics == "matched":
        variables["VLLM_BATCH_INVARIANT"] = "1"
    engine = None
    with terminated_by_exception():
        try:
            with environment(**variables), interruptible_start():
                engine = LLM(**engine_kwargs(config))
            yield engine
        finally:
            if engine is not None:
                with _kept_process_group() if in_process else contextlib.nullcontext():
                    engine.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _kept_process_group() -> Iterator[None]:
    """In this context nobody destroys torch's default process group.

    An engine core takes a group that is there for its own, and destroys it when it is shut down (vLLM 0.30).
    """
    import torch.distributed as dist

    destroy = dist.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group not in (None, dist.group.WORLD):
            destroy(group)

    dist.destroy_process_group = destroy_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
