"""SkyRL's settings with one more, and SkyRL's validation with one check exchanged."""

from dataclasses import dataclass, field

from skyrl.train.config import FSDPConfig, PolicyConfig, SkyRLTrainConfig, TrainerConfig
from skyrl.train.utils import utils

from trainer_hooks.sampling_sets import truncated_without
from trainer_hooks.support import Refusal, require_supported

FLAG = "trainer.policy.fsdp_config.moe_enable_routing_replay"
CAPTURE = "generator.inference_engine.enable_return_routed_experts"


@dataclass
class RoutingReplayFSDPConfig(FSDPConfig):
    """Settings of FSDP.

    Attributes:
        moe_enable_routing_replay: replay the experts that the rollout engine chose, in the policy's forwards.
    """

    moe_enable_routing_replay: bool = False


@dataclass
class RoutingReplayPolicyConfig(PolicyConfig):
    """Settings of the policy."""

    fsdp_config: RoutingReplayFSDPConfig = field(default_factory=RoutingReplayFSDPConfig)


@dataclass
class RoutingReplayTrainerConfig(TrainerConfig):
    """Settings of the trainer."""

    policy: RoutingReplayPolicyConfig = field(default_factory=RoutingReplayPolicyConfig)


@dataclass
class RoutingReplayConfig(SkyRLTrainConfig):
    """All of SkyRL's settings, and `trainer.policy.fsdp_config.moe_enable_routing_replay`."""

    trainer: RoutingReplayTrainerConfig = field(default_factory=RoutingReplayTrainerConfig)


REFUSALS = (
    Refusal(
        setting=f"{CAPTURE}=false",
        why="the engine returns no routing, so there is nothing to replay",
        cure=f"Set {CAPTURE}=true",
        found=lambda cfg: not cfg.generator.inference_engine.enable_return_routed_experts,
    ),
    Refusal(
        setting="trainer.strategy other than fsdp",
        why=f"{FLAG} is of FSDP's models",
        cure="Set trainer.strategy=fsdp; for Megatron, SkyRL has a replay of its own: "
        "trainer.policy.megatron_config.moe_enable_routing_replay",
        found=lambda cfg: cfg.trainer.strategy not in ("fsdp", "fsdp2"),
    ),
    Refusal(
        setting="generator.inference_engine.distributed_executor_backend other than mp",
        why="SkyRL found that capture can hang with it",
        cure="Set generator.inference_engine.distributed_executor_backend=mp",
        found=lambda cfg: cfg.generator.inference_engine.distributed_executor_backend != "mp",
    ),
    truncated_without(
        setting="top_p, top_k or min_p (generator.sampling_params) without enable_sample_support_replay",
        cure="Set trainer.algorithm.enable_sample_support_replay=true and "
        "generator.inference_engine.enable_return_sample_support_set=true: SkyRL carries these ids by itself",
        sampling_of=lambda cfg: vars(cfg.generator.sampling_params),
        carried=lambda cfg: cfg.trainer.algorithm.enable_sample_support_replay,
    ),
)


def validate_cfg(cfg: SkyRLTrainConfig) -> None:
    """SkyRL's `validate_cfg`. With replay on, capture is admitted under FSDP, and nothing else is changed.

    Raises:
        ConfigError: replay is on, with settings that it does not support.
    """
    if not replay_is_on(cfg):
        utils.validate_cfg(cfg)
        return
    require_supported("SkyRL", REFUSALS, cfg)
    stock = utils.validate_inference_engine_cfg

    def validate_inference_engine_cfg(cfg: SkyRLTrainConfig) -> None:
        # With capture on, it asks for three things: Megatron, Megatron's flag, and the backend that is refused above.
        engine = cfg.generator.inference_engine
        engine.enable_return_routed_experts = False
        try:
            stock(cfg)
        finally:
            engine.enable_return_routed_experts = True

    utils.validate_inference_engine_cfg = validate_inference_engine_cfg
    try:
        utils.validate_cfg(cfg)
    finally:
        utils.validate_inference_engine_cfg = stock


def replay_is_on(cfg: SkyRLTrainConfig) -> bool:
    """Whether a policy under FSDP replays: False also with settings that do not know it."""
    return getattr(cfg.trainer.policy.fsdp_config, "moe_enable_routing_replay", False)
