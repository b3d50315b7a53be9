"""What of SkyRL the hook calls, replaces or overrides."""

from importlib import import_module
from typing import Any

from trainer_hooks.support import Seam, require_seams

TESTED = "0.4.0"

_WORKER = "skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker:FSDPPolicyWorkerBase"
_EXPERIENCE = "skyrl.train.dataset.replay_buffer:Experience.__dataclass_fields__"
_PACKED = "skyrl.backends.skyrl_train.utils.packed_tensor:PackedTensor"
_SLICES = "skyrl.backends.skyrl_train.distributed.ulysses.utils:ulysses_pad_and_slice_inputs"

# Where it lives, and the parameters that it must begin with.
SEAMS: dict[str, tuple[str, ...]] = {
    "skyrl.train.config:FSDPConfig": (),
    "skyrl.train.config:PolicyConfig.__dataclass_fields__.fsdp_config": (),
    "skyrl.train.config:TrainerConfig.__dataclass_fields__.policy": (),
    "skyrl.train.config:SkyRLTrainConfig.__dataclass_fields__.trainer": (),
    "skyrl.train.config:SkyRLTrainConfig.from_cli_overrides": ("args",),
    "skyrl.train.config:AlgorithmConfig.__dataclass_fields__.enable_sample_support_replay": (),
    "skyrl.train.utils.utils:validate_cfg": ("cfg",),
    "skyrl.train.utils.utils:validate_inference_engine_cfg": ("cfg",),
    "skyrl.train.utils.utils:initialize_ray": ("cfg",),
    "skyrl.train.entrypoints.main_base:skyrl_entrypoint": (),
    "skyrl.train.entrypoints.main_base:BasePPOExp.get_trainer": ("cfg",),
    "skyrl.train.entrypoints.main_base:BasePPOExp.run": (),
    "skyrl.train.trainer:RayPPOTrainer.build_models": ("PolicyWorker", "CriticWorker", "RefWorker"),
    f"{_WORKER.partition(':')[0]}:PolicyWorker": (),
    f"{_WORKER}.init_model": ("model_path", "num_training_steps"),
    f"{_WORKER}._seq_parallel_monkey_patch": ("model", "use_parent_class"),
    f"{_WORKER}._forward_micro_batch": ("micro_batch",),
    f"{_WORKER}._forward_backward_micro": ("experience",),
    f"{_WORKER}._forward_micro_with_loss": ("experience",),
    f"{_EXPERIENCE}.rollout_expert_indices": (),
    f"{_EXPERIENCE}.router_padding_mask": (),
    f"{_EXPERIENCE}.attention_mask": (),
    f"{_PACKED}.sequence_lengths": (),
    _SLICES: ("input_ids_rmpad", "position_ids_rmpad", "attention_mask_rmpad", "sp_size"),
}


def require_skyrl() -> None:
    """Raise `ConfigError` unless the installed SkyRL has all that the hook relies on."""
    seams = (Seam(where=path.replace(":", "."), target=_found(path), parameters=names) for path, names in SEAMS.items())
    require_seams("skyrl", TESTED, seams)


def _found(path: str) -> Any:
    """What `module:name.name` is, or None."""
    module, _, names = path.partition(":")
    try:
        target: Any = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "skyrl":
            raise  # a package that SkyRL needs, which is not for this hook to judge
        return None
    for name in names.split("."):
        target = target.get(name) if isinstance(target, dict) else getattr(target, name, None)
    return target
