"""Settings: frozen dataclasses that mirror the dotted `key=value` names, and the only reader of the environment."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from r3.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
MIXED_VERSIONS = ("keep", "invalidate", "drop")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """Folder of the policy: config, tokenizer and safetensors."""


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    moe_enable_routing_replay: bool = True
    """Replay the rollouts' routing in training. Needs `generator.inference_engine.enable_return_routed_experts`."""
    gradient_checkpointing: bool = True
    param_dtype: str = "bfloat16"
    """dtype of forward and backward; the optimizer works on float32 parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    sequence_parallel_size: int = 1
    """Ranks that share each row (Ulysses). Must divide the ranks, and the model's query heads."""
    model: ModelConfig = field(default_factory=ModelConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    eps_clip_low: float = 0.2
    eps_clip_high: float = 0.28
    """Bounds 1 - low and 1 + high of the probability ratio."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    max_steps: int = 12
    train_batch_size: int = 32
    """Prompts a step."""
    updates_per_step: int = 1
    """Optimizer updates a step: the step's rollouts are split into so many mini-batches."""
    micro_train_batch_size: int = 64
    """Rollouts in one forward and backward of a rank, or of ranks that share rows."""
    use_sample_packing: bool = True
    """Several rollouts a row, instead of padding."""
    timeout_s: float = 3600.0
    """Longest wait of a rank for the others, such as for the first one's rollouts."""
    seed: int = 0
    output_dir: str = ""
    """Run folder; by default a new one under `runs/`."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    max_generate_length: int = 96
    """Tokens a completion."""


@dataclass(frozen=True, kw_only=True)
class WeightSyncConfig:
    transport: str = "files"
    """`files`, `gloo`, `nccl` between GPUs, or `ipc` on one GPU."""
    delta: bool = False
    """Send only what changed since the last version. Costs a copy of the weights in main memory on both sides."""
    fused_experts: bool = False
    """Send the experts of a layer as one tensor, as transformers has them: faster, where vLLM's model takes them so."""
    chunk_mib: float = 512.0
    """Largest chunk, MiB."""
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class InferenceEngineConfig:
    enable_return_routed_experts: bool = True
    """Capture routing. Replay needs it."""
    mixed_weight_versions: str = "keep"
    """Rollouts during which the weights changed: `keep` their routing, under which their tokens were sampled;
    `invalidate` rows of older weights, which are then routed live; or `drop` the rollout."""
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int = 512
    max_num_seqs: int = 256
    enforce_eager: bool = True
    """No compilation and no CUDA graphs. vLLM's compiled CPU mode does not capture."""
    cpu_kv_cache_gib: float = 0.5
    gpu_memory_utilization: float = 0.3
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    n_samples_per_prompt: int = 8
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    inference_engine: InferenceEngineConfig = field(default_factory=InferenceEngineConfig)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: str = "chain_sum"
    """A data set of the reasoning-gym package."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its own settings, such as `task.settings.max_terms=4`."""


@dataclass(frozen=True, kw_only=True)
class R3Config:
    """All settings of a run. `R3Config.from_overrides(["trainer.max_steps=3"])` reads dotted `key=value` pairs."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    task: TaskConfig = field(default_factory=TaskConfig)

    @classmethod
    def from_overrides(cls, overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> "R3Config":
        """Settings from `key=value` pairs on top of `defaults` (dotted key -> value) on top of the built-in ones.

        Raises:
            ConfigError: a pair without "=", an unknown key, a value of the wrong type, or settings that contradict.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        malformed = [pair for pair in overrides if "=" not in pair or pair.startswith("=")]
        if malformed:
            raise ConfigError(f"expected key=value, got {', '.join(map(repr, malformed))}")
        known = _keys(cls)
        merged = OmegaConf.structured(cls)
        given = [(key, value, False) for key, value in (defaults or {}).items()]
        given += [(*pair.split("=", 1), True) for pair in overrides]
        for key, value, is_text in given:
            if key not in known and not key.startswith("task.settings."):
                raise ConfigError(f"unknown setting {key!r}{_suggestion(key, known)}")
            try:
                pair = OmegaConf.from_dotlist([f"{key}={value}"]) if is_text else OmegaConf.create({})
                if not is_text:
                    OmegaConf.update(pair, key, value)
                merged = OmegaConf.merge(merged, pair)
            except (OmegaConfBaseException, ValueError, YAMLError) as error:
                raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
        config = OmegaConf.to_object(merged)
        assert isinstance(config, cls)
        config.check()
        return config

    def check(self, ranks: int | None = None) -> None:
        """Raise `ConfigError` for settings that contradict each other or make no sense; all of them at once.

        `ranks` is the number of trainer processes, where it is known.
        """
        fsdp, engine = self.trainer.policy.fsdp_config, self.generator.inference_engine
        problems = []
        if fsdp.moe_enable_routing_replay and not engine.enable_return_routed_experts:
            problems.append(
                "trainer.policy.fsdp_config.moe_enable_routing_replay=true needs "
                "generator.inference_engine.enable_return_routed_experts=true: without capture nothing can be replayed"
            )
        dtypes = {
            "trainer.policy.fsdp_config.param_dtype": fsdp.param_dtype,
            "generator.inference_engine.dtype": engine.dtype,
        }
        choices = {key: (value, DTYPES) for key, value in dtypes.items()}
        choices["generator.inference_engine.mixed_weight_versions"] = (engine.mixed_weight_versions, MIXED_VERSIONS)
        problems += [
            f"{key}: expected one of {', '.join(known)}, got {value!r}"
            for key, (value, known) in choices.items()
            if value not in known
        ]
        positive = {
            "trainer.max_steps": self.trainer.max_steps,
            "trainer.train_batch_size": self.trainer.train_batch_size,
            "trainer.updates_per_step": self.trainer.updates_per_step,
            "trainer.micro_train_batch_size": self.trainer.micro_train_batch_size,
            "trainer.policy.sequence_parallel_size": self.trainer.policy.sequence_parallel_size,
            "trainer.timeout_s": self.trainer.timeout_s,
            "generator.sampling_params.temperature": self.generator.sampling_params.temperature,
            "generator.sampling_params.max_generate_length": self.generator.sampling_params.max_generate_length,
            "generator.inference_engine.tensor_parallel_size": engine.tensor_parallel_size,
            "generator.inference_engine.pipeline_parallel_size": engine.pipeline_parallel_size,
            "generator.inference_engine.weight_sync.chunk_mib": engine.weight_sync.chunk_mib,
            "generator.inference_engine.weight_sync.timeout_s": engine.weight_sync.timeout_s,
        }
        problems += [f"{key}: expected a value above 0, got {value}" for key, value in positive.items() if value <= 0]
        if self.generator.n_samples_per_prompt < 2:
            problems.append(
                f"generator.n_samples_per_prompt: expected at least 2 to compare with each other, got "
                f"{self.generator.n_samples_per_prompt}"
            )
        if ranks is not None and not problems:
            problems += self._problems_of_ranks(ranks)
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems_of_ranks(self, ranks: int) -> list[str]:
        size = self.trainer.policy.sequence_parallel_size
        if ranks % size:
            return [f"trainer.policy.sequence_parallel_size: expected a divisor of the {ranks} ranks, got {size}"]
        # Every rank takes part in every forward, so that all need the same number of rollouts in each update.
        rollouts = self.trainer.train_batch_size * self.generator.n_samples_per_prompt
        parts = self.trainer.updates_per_step * (ranks // size)
        if rollouts % parts:
            return [
                f"trainer.train_batch_size * generator.n_samples_per_prompt: expected a multiple of {parts} "
                f"(trainer.updates_per_step * ranks / trainer.policy.sequence_parallel_size), got {rollouts}"
            ]
        return []

    def to_flat(self) -> dict[str, Any]:
        """Dotted key -> value, as `from_overrides` takes them."""
        return _flat(self)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for what is made in this context, for libraries that read theirs nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def local_rank() -> int:
    """Place of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_rank() -> tuple[int, int]:
    """(rank, world size) that torchrun or accelerate launch gave this process; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            found |= _flat(value, f"{key}.")
        elif isinstance(value, dict):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _keys(cls: type) -> list[str]:
    return [*_flat(cls()), "task.settings"]


def _suggestion(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    by_name = [other for other in known if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = by_name or get_close_matches(key, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; r3 demo --settings lists them"
