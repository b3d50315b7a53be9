"""Settings: frozen dataclasses that mirror the dotted `key=value` names, and the only reader of the environment."""

from r3.config.environment import environment, local_rank, process_rank, variables
from r3.config.generator import (
    MIXED_VERSIONS,
    TRANSPORTS,
    GeneratorConfig,
    InferenceEngineConfig,
    SamplingConfig,
    WeightSyncConfig,
)
from r3.config.listing import settings_lines, settings_table
from r3.config.parts import (
    DTYPES,
    ENGINE_FAULTS,
    MOST_REPEAT_NATS,
    SINKS,
    AlarmsConfig,
    AlgorithmConfig,
    DiagnosticsConfig,
    FSDPConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    TaskConfig,
    TrainerConfig,
)
from r3.config.ray_cluster import RayConfig
from r3.config.run_config import R3Config

__all__ = [
    "DTYPES",
    "ENGINE_FAULTS",
    "MIXED_VERSIONS",
    "MOST_REPEAT_NATS",
    "SINKS",
    "TRANSPORTS",
    "AlarmsConfig",
    "AlgorithmConfig",
    "DiagnosticsConfig",
    "FSDPConfig",
    "GeneratorConfig",
    "InferenceEngineConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "R3Config",
    "RayConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrainerConfig",
    "WeightSyncConfig",
    "environment",
    "local_rank",
    "process_rank",
    "settings_lines",
    "settings_table",
    "variables",
]
