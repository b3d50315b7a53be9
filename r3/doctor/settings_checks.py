"""Check of a run's settings against each other, this machine and the model."""

from pathlib import Path

from r3.config import R3Config
from r3.doctor.check import Check
from r3.errors import summary
from r3.parallel.expert_parallel import num_experts


def run_settings(config: R3Config) -> Check:
    """Check for settings that would stop a run here, or silently change its meaning.

    Raises:
        ConfigError: settings that contradict each other.
    """
    import torch

    config.check()
    engine, policy = config.generator.inference_engine, config.trainer.policy
    problems = []
    if engine.weight_sync.transport in ("nccl", "ipc") and not torch.cuda.is_available():
        problems.append(
            f"generator.inference_engine.weight_sync.transport={engine.weight_sync.transport} needs a GPU, and there "
            "is none: use files or gloo"
        )
    if config.generator.sampling_params.max_generate_length >= engine.max_model_len:
        problems.append(
            "generator.sampling_params.max_generate_length: expected less than "
            f"generator.inference_engine.max_model_len ({engine.max_model_len}), got "
            f"{config.generator.sampling_params.max_generate_length}: no room for a prompt"
        )
    if policy.model.path and (Path(policy.model.path) / "config.json").is_file():
        problems += _of_model(config)
    if problems:
        return Check(
            name="settings",
            status="problem",
            detail=f"{len(problems)} faults:{summary(problems)}",
            remedy="change them",
        )
    replay = "on" if policy.fsdp_config.moe_enable_routing_replay else "off"
    return Check(
        name="settings",
        status="ok",
        detail=f"replay {replay}, trained in {policy.fsdp_config.param_dtype}, sampled in {engine.dtype}, weights by "
        f"{engine.weight_sync.transport}",
    )


def _of_model(config: R3Config) -> list[str]:
    from transformers import AutoConfig

    policy, engine = config.trainer.policy, config.generator.inference_engine
    text = AutoConfig.from_pretrained(policy.model.path).get_text_config()
    heads, positions = getattr(text, "num_attention_heads", None), getattr(text, "max_position_embeddings", None)
    problems = []
    if heads is not None and heads % policy.sequence_parallel_size:
        problems.append(
            f"trainer.policy.sequence_parallel_size: expected a divisor of the {heads} query heads, got "
            f"{policy.sequence_parallel_size}"
        )
    experts = num_experts(text)
    if experts is not None and experts % policy.expert_parallel_size:
        problems.append(
            f"trainer.policy.expert_parallel_size: expected a divisor of the {experts} experts, got "
            f"{policy.expert_parallel_size}"
        )
    if positions is not None and engine.max_model_len > positions:
        problems.append(
            f"generator.inference_engine.max_model_len: expected at most the model's {positions} positions, got "
            f"{engine.max_model_len}"
        )
    return problems
