"""All settings of a run: read from `key=value` pairs, checked, and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from r3.config.fields import part, problems_of
from r3.config.generator import GeneratorConfig
from r3.config.parts import TaskConfig, TrainerConfig
from r3.config.ray_cluster import RayConfig
from r3.errors import ConfigError, summary


@dataclass(frozen=True, kw_only=True)
class R3Config:
    """All settings of a run. `R3Config.from_overrides(["trainer.max_steps=3"])` reads dotted `key=value` pairs."""

    trainer: TrainerConfig = part(TrainerConfig)
    generator: GeneratorConfig = part(GeneratorConfig)
    ray: RayConfig = part(RayConfig)
    task: TaskConfig = part(TaskConfig)

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
        _make_writable(merged)
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
        found = list(problems_of(self))
        problems = [problem for problem, _ in found]
        if not any(of_type for _, of_type in found):
            problems += [*self.trainer.problems(), *self._contradictions()]
        if ranks is not None and not problems:
            problems += self._problems_of_ranks(ranks)
        if problems:
            raise ConfigError(problems[0] if len(problems) == 1 else f"{len(problems)} settings:{summary(problems)}")

    def _contradictions(self) -> list[str]:
        engine, alarms = self.generator.inference_engine, self.trainer.diagnostics.alarms
        problems = engine.weight_sync.problems("generator.inference_engine.weight_sync")
        problems += self.generator.sampling_params.problems("generator.sampling_params")
        problems += self.ray.problems(self.trainer.resume_from)
        if self.ray.num_workers and engine.addresses:
            problems.append(
                f"generator.inference_engine.addresses: expected none beside ray.num_workers={self.ray.num_workers}: "
                "Ray starts num_engines engines on its nodes"
            )
        if engine.addresses and engine.num_engines > 1:
            problems.append(
                f"generator.inference_engine.num_engines: expected 1 beside addresses, which are engines that run, got "
                f"{engine.num_engines}"
            )
        if engine.weight_sync.on_running != "wait" and not (engine.pooled or self.ray.num_workers):
            problems.append(
                f"generator.inference_engine.weight_sync.on_running={engine.weight_sync.on_running} needs addresses or "
                "num_engines above 1: the one engine that the run starts is idle in a sync"
            )
        problems += self._problems_in_process()
        problems += self._problems_of_numerics()
        policy = self.trainer.policy
        if policy.expert_parallel_size > 1 and policy.fsdp_config.param_dtype == "float16":
            problems.append(
                "trainer.policy.expert_parallel_size above 1 needs trainer.policy.fsdp_config.param_dtype=bfloat16 or "
                "float32: transformers, which shards the model then, has no other"
            )
        if engine.enable_return_routed_experts:
            return problems
        if self.trainer.policy.fsdp_config.moe_enable_routing_replay:
            problems.append(
                "trainer.policy.fsdp_config.moe_enable_routing_replay=true needs "
                "generator.inference_engine.enable_return_routed_experts=true: without capture nothing can be replayed"
            )
        if alarms.enabled and alarms.bounds("coverage") != (None, None):
            problems.append(
                "trainer.diagnostics.alarms.coverage_warn and coverage_stop need "
                "generator.inference_engine.enable_return_routed_experts=true; set both to null to do without"
            )
        return problems

    def _problems_in_process(self) -> list[str]:
        """What an engine in the trainer's own process cannot do."""
        engine = self.generator.inference_engine
        if not engine.in_process:
            return []
        own = (
            "generator.inference_engine.weight_sync.transport=in_process runs one engine of one worker in the trainer's"
        )
        problems = []
        if engine.pooled or engine.tensor_parallel_size * engine.pipeline_parallel_size > 1:
            problems.append(
                f"{own} process: expected num_engines, tensor_parallel_size and pipeline_parallel_size of 1 and no "
                "addresses; take `ipc`, `nccl` or `files` for processes of their own"
            )
        if self.trainer.max_staleness:
            problems.append(
                f"{own} process, where it would take turns with the training beside it: expected "
                f"trainer.max_staleness=0, got {self.trainer.max_staleness}; take `ipc` for an engine beside it"
            )
        return problems

    def _problems_of_numerics(self) -> list[str]:
        """What computes in another order than one worker of a batch-invariant engine, or was not compared."""
        policy, engine = self.trainer.policy, self.generator.inference_engine
        if policy.numerics == "own":
            return []
        wanted: dict[str, tuple[Any, Any]] = {
            "trainer.policy.fsdp_config.param_dtype": (policy.fsdp_config.param_dtype, "bfloat16"),
            "trainer.policy.sequence_parallel_size": (policy.sequence_parallel_size, 1),
            "trainer.policy.expert_parallel_size": (policy.expert_parallel_size, 1),
            "trainer.policy.model.use_liger_kernel": (policy.model.use_liger_kernel, False),
            "generator.inference_engine.dtype": (engine.dtype, "bfloat16"),
            "generator.inference_engine.tensor_parallel_size": (engine.tensor_parallel_size, 1),
            "generator.inference_engine.pipeline_parallel_size": (engine.pipeline_parallel_size, 1),
        }
        matched = "trainer.policy.numerics=matched"
        problems = [
            f"{matched} needs {name}={right}, got {got}" for name, (got, right) in wanted.items() if got != right
        ]
        if engine.pooled or self.ray.num_workers:
            problems.append(
                f"{matched} needs the one engine that the run starts: expected no addresses, num_engines=1 and "
                "ray.num_workers=0; others need not be batch-invariant"
            )
        if engine.in_process:
            problems.append(
                f"{matched} needs an engine in a process of its own, got weight_sync.transport=in_process: "
                "batch-invariant, vLLM replaces operators of torch in its whole process, in the trainer's gradients too"
            )
        if self.generator.sampling_params.truncated:
            problems.append(f"{matched} needs sampling from the whole vocabulary: no top_k, top_p or min_p")
        return problems

    def _problems_of_ranks(self, ranks: int) -> list[str]:
        size = self.trainer.policy.sequence_parallel_size
        if ranks > 1 and self.generator.inference_engine.in_process:
            return [
                "generator.inference_engine.weight_sync.transport=in_process: expected one rank, since vLLM takes the "
                f"process group of its process for its own, got {ranks}; take `ipc`, `nccl` or `files`"
            ]
        if ranks % size:
            return [f"trainer.policy.sequence_parallel_size: expected a divisor of the {ranks} ranks, got {size}"]
        experts = self.trainer.policy.expert_parallel_size
        if ranks % experts:
            return [f"trainer.policy.expert_parallel_size: expected a divisor of the {ranks} ranks, got {experts}"]
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


def _make_writable(node: Any) -> None:
    """omegaconf 2.3, which hydra 1.3 asks for, makes each node of a frozen dataclass read-only; 2.4 does not."""
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for name in node:
            _make_writable(node[name])


def _suggestion(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    by_name = [other for other in known if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = by_name or get_close_matches(key, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; r3 settings lists them"
