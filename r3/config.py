"""Settings: frozen dataclasses that mirror the dotted `key=value` names, and the only reader of the environment."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from r3.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
MIXED_VERSIONS = ("keep", "invalidate", "drop")
SINKS = ("tensorboard", "trackio", "wandb")
ENGINE_FAULTS = ("repetition", "logprobs", "selection")
MOST_REPEAT_NATS = 0.1
"""Mean over tokens of how far an engine's second answer to a prompt at temperature 0 may be from its first."""


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
class AlarmsConfig:
    """Bounds that warn, and bounds that stop the run; null for none.

    `docs/reference/alarms-and-sinks.md` says why these values.
    """

    enabled: bool = False
    k3_warn: float | None = 2e-3
    """Above this, nats a token. Of the replayed side where it is recorded, else of the live one."""
    k3_stop: float | None = 5e-2
    extreme_frac_warn: float | None = 1e-3
    """Above this share of tokens whose ratio leaves [1 / extreme_ratio, extreme_ratio]; the side as for k3."""
    extreme_frac_stop: float | None = 1e-2
    coverage_warn: float | None = 0.99
    """Below this share of the rollouts' rows that have routing."""
    coverage_stop: float | None = 0.9
    version_lag_warn: float | None = 2
    """Above this many weight versions between the trainer and the oldest row."""
    version_lag_stop: float | None = 8

    def bounds(self, name: str) -> tuple[float | None, float | None]:
        """The bounds that warn and that stop, of `k3`, `extreme_frac`, `coverage` or `version_lag`."""
        return getattr(self, f"{name}_warn"), getattr(self, f"{name}_stop")

    def problems(self, prefix: str) -> list[str]:
        """What contradicts or makes no sense; `prefix` goes before the names."""
        problems = []
        ranges = dict.fromkeys(("k3", "version_lag"), math.inf) | dict.fromkeys(("extreme_frac", "coverage"), 1.0)
        for name, most in ranges.items():
            warn, stop = self.bounds(name)
            for kind, value in (("warn", warn), ("stop", stop)):
                if value is not None and not (0 <= value <= most and value < math.inf):
                    expected = "0 to 1" if most == 1 else "0 or more"
                    problems.append(f"{prefix}.{name}_{kind}: expected {expected}, or null for none, got {value}")
            if warn is None or stop is None:
                continue
            if name == "coverage" and stop > warn:
                problems.append(f"{prefix}.coverage_stop: expected at most coverage_warn ({warn}), got {stop}")
            elif name != "coverage" and stop < warn:
                problems.append(f"{prefix}.{name}_stop: expected at least {name}_warn ({warn}), got {stop}")
        bounds = [bound for name in ranges for bound in self.bounds(name)]
        if self.enabled and not any(bound is not None for bound in bounds):
            problems.append(f"{prefix}.enabled=true needs a bound that is not null")
        if not self.enabled and self != AlarmsConfig():
            problems.append(
                f"{prefix}: bounds are set but nothing watches them; set {prefix}.enabled=true, or leave them"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    every: int = 1
    """Measure the gap, live and replayed, at the first step and every so many after it; 0 for never."""
    details_every: int = 10
    """Every so many measured steps, beginning with the first, keep single tokens for the report; 0 for never."""
    extreme_ratio: float = 2.0
    """A token is extreme if its ratio of probabilities leaves [1 / extreme_ratio, extreme_ratio]."""
    sinks: list[str] = field(default_factory=list)
    """Where metrics go beside the run folder: any of `tensorboard`, `trackio` and `wandb`."""
    project: str = "r3"
    """Name of the project in trackio and wandb."""
    save_rollouts_every: int = 0
    """Save the rollouts of the first step and of every so many after it; 0 for never."""
    accepted_engine_faults: list[str] = field(default_factory=list)
    """An engine that differs from the trainer before the first step stops the run, but for these: any of `repetition`,
    `logprobs` and `selection`. `docs/reference/engines.md` says what they are."""
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def measures(self, step: int) -> bool:
        """Whether the gap is measured at `step`, which counts from 1."""
        return self.every > 0 and (step - 1) % self.every == 0

    def details(self, step: int) -> bool:
        """Whether single tokens of `step` are kept; only of steps that are measured."""
        return self.measures(step) and self.details_every > 0 and (step - 1) // self.every % self.details_every == 0

    def saves_rollouts(self, step: int) -> bool:
        """Whether the rollouts of `step` are saved."""
        return self.save_rollouts_every > 0 and (step - 1) % self.save_rollouts_every == 0

    def problems(self) -> list[str]:
        """What contradicts or makes no sense, by dotted name."""
        prefix = "trainer.diagnostics"
        intervals = ("every", "details_every", "save_rollouts_every")
        problems = [
            f"{prefix}.{name}: expected 0 (never) or more, got {getattr(self, name)}"
            for name in intervals
            if getattr(self, name) < 0
        ]
        if not 1 < self.extreme_ratio < math.inf:
            problems.append(f"{prefix}.extreme_ratio: expected a finite ratio above 1, got {self.extreme_ratio}")
        if not self.project:
            problems.append(f"{prefix}.project: expected a name, got an empty one")
        if unknown := [name for name in self.sinks if name not in SINKS]:
            problems.append(f"{prefix}.sinks: expected any of {', '.join(SINKS)}, got {', '.join(map(repr, unknown))}")
        if unknown := [name for name in self.accepted_engine_faults if name not in ENGINE_FAULTS]:
            problems.append(
                f"{prefix}.accepted_engine_faults: expected any of {', '.join(ENGINE_FAULTS)}, got "
                f"{', '.join(map(repr, unknown))}"
            )
        if len(set(self.sinks)) < len(self.sinks):
            problems.append(f"{prefix}.sinks: expected each once, got {', '.join(self.sinks)}")
        if self.alarms.enabled and self.every == 0:
            problems.append(
                f"{prefix}.alarms.enabled=true needs {prefix}.every above 0: there is nothing to watch otherwise"
            )
        return problems + self.alarms.problems(f"{prefix}.alarms")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
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
        lists = [key for key, value in cls().to_flat().items() if isinstance(value, list)]
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
                expected = f"expected a list, such as {key}=[{value}]; " if key in lists else ""
                raise ConfigError(f"{key}={value}: {expected}{str(error).splitlines()[0]}") from error
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
        problems += self.trainer.diagnostics.problems()
        alarms = self.trainer.diagnostics.alarms
        if alarms.enabled and not engine.enable_return_routed_experts and alarms.bounds("coverage") != (None, None):
            problems.append(
                "trainer.diagnostics.alarms.coverage_warn and coverage_stop need "
                "generator.inference_engine.enable_return_routed_experts=true; set both to null to do without"
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


def variables(names: Sequence[str]) -> dict[str, str]:
    """Those of these environment variables that are set, with their values."""
    return {name: os.environ[name] for name in names if name in os.environ}


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
