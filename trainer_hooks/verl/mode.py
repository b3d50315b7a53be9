"""`router_replay` of an engine's configuration, and what is refused with it."""

from collections.abc import Mapping
from typing import Any

from r3.errors import ConfigError
from trainer_hooks.sampling_sets import truncated_without
from trainer_hooks.support import Refusal, require_supported

MODES = ("disabled", "R2", "R3")
KEY = "actor_rollout_ref.actor.fsdp_config.router_replay.mode"


def replay_mode(engine_config: Any) -> str:
    """One of `MODES`: "R3" replays the rollout's routing, "R2" that of the trainer's own old log-probabilities.

    verl's FSDP configuration has the field, but its YAML lacks it: what the command line adds arrives as a mapping.

    Raises:
        ConfigError: another mode, or keys without `mode`.
    """
    given = getattr(engine_config, "router_replay", None)
    if isinstance(given, Mapping):
        mode = given.get("mode", None if given else "disabled")
    else:
        mode = getattr(given, "mode", "disabled")
    if mode not in MODES:
        raise ConfigError(f"{KEY}: expected one of {', '.join(MODES)}, got {mode!r} (router_replay={given!r})")
    return mode


# Of an engine whose model is built and attached.
REFUSALS = (
    Refusal(
        setting="actor_rollout_ref.model.use_fused_kernels=True",
        why="verl's fused forward of the model drops the routing before it reaches the decoder",
        cure="Set it to False",
        found=lambda engine: bool(engine.model_config.use_fused_kernels or engine.engine_config.use_fused_kernels),
    ),
    Refusal(
        setting="ulysses_sequence_parallel_size > 1 with a model that takes images",
        why="verl slices such a model's tokens behind its embedding, where routing for them no longer fits",
        cure="Set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
        found=lambda engine: engine.use_ulysses_sp and hasattr(engine.model_config.hf_config, "vision_config"),
    ),
    Refusal(
        setting="a model that routes each token to one expert",
        why="verl marks tokens without routing by zeros, which with one slot a layer are the choice of expert 0",
        cure="Turn replay off for this model",
        found=lambda engine: engine.replay is not None and engine.replay.spec.top_k == 1,
    ),
)

# Of `actor_rollout_ref`, where replay is on.
_OF_SAMPLING = (
    truncated_without(
        setting="actor_rollout_ref.rollout.top_p or top_k",
        cure="Set actor_rollout_ref.rollout.top_p=1.0 and actor_rollout_ref.rollout.top_k=-1",
        sampling_of=lambda config: {name: config.rollout[name] for name in ("temperature", "top_p", "top_k")},
    ),
)


def require_supported_sampling(config: Any) -> None:
    """Raise if an actor that replays is to train on what was sampled from a part of the vocabulary.

    Args:
        config: `actor_rollout_ref` of verl's configuration.

    Raises:
        ConfigError: names the setting, and what to do instead.
    """
    engine = config.actor.get("fsdp_config")
    if engine is not None and config.get("rollout") is not None and replay_mode(engine) != "disabled":
        require_supported(f"verl ({KEY}={replay_mode(engine)})", _OF_SAMPLING, config)
