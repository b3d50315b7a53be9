"""Which experts function a model uses."""

import logging

from torch import nn

from r3.errors import UnsupportedModelError, summary
from r3.experts.fit import expert_layers, unfit
from r3.experts.grouped import NAME, grouped_experts

logger = logging.getLogger("r3")

AUTO = "auto"
_SETTING = "trainer.policy.model.experts_implementation"
# They write their products into plain tensors, so that no gradient comes back, and none is missed.
_WITHOUT_BACKWARD = "deepgemm"


def register() -> str:
    """Put `grouped_experts` into transformers' registry; returns its name there, for `experts_implementation=`.

    A second call does nothing.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> path = "examples/chain_sum_moe"
        >>> model = AutoModelForCausalLM.from_pretrained(path, experts_implementation=register())
        >>> model.config._experts_implementation
        'r3_grouped'
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts)
    return NAME


def use_experts(model: nn.Module, implementation: str = AUTO) -> str:
    """Have the expert layers of a transformers model computed by `implementation`; returns its name.

    Args:
        model: before it is wrapped or sharded.
        implementation: a name in transformers' registry of experts functions, `r3_grouped`, or `eager`. `auto` is
            `r3_grouped`, unless an expert layer does not fit: then, with a warning, the model keeps what it has.

    Raises:
        UnsupportedModelError: expert layers that `implementation` cannot compute, by name; it is not registered; or it
            cannot train.
    """
    layers = expert_layers(model)
    # Layers of one class and model have the same reason.
    reasons = sorted({f"{type(layer).__name__}: {reason}" for _, layer in layers if (reason := unfit(layer))})
    found = str(getattr(model.config, "_experts_implementation", "eager"))
    if implementation == AUTO:
        if reasons:
            logger.warning(
                "%s=auto: %s stays with transformers' %s, as %s cannot compute%s",
                _SETTING, type(model).__name__, found, NAME, summary(reasons),
            )  # fmt: skip
        if reasons or not layers:
            return found
        implementation = NAME
    if implementation == register() and reasons:
        raise UnsupportedModelError(
            f"{_SETTING}={NAME}: cannot compute these layers of {type(model).__name__}; set auto, or grouped_mm of "
            f"transformers:{summary(reasons)}"
        )
    if implementation.startswith(_WITHOUT_BACKWARD):
        raise UnsupportedModelError(f"{_SETTING}={implementation}: expected a function with a backward, it has none")
    if not layers and implementation != found:
        raise UnsupportedModelError(
            f"{_SETTING}={implementation}: expected expert layers that transformers' registry of experts functions "
            f"reaches, {type(model).__name__} has none; set auto"
        )
    try:
        model.set_experts_implementation(implementation)  # pyrefly: ignore
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(f"{_SETTING}={implementation}: {error}") from error
    # transformers sets it in the configurations of models, and each layer reads the one that it was made with.
    others = [path for path, layer in layers if _reads(layer) != implementation]
    if others:
        raise UnsupportedModelError(f"{_SETTING}={implementation}: it did not reach these layers:{summary(others)}")
    return implementation


def _reads(layer: nn.Module) -> str:
    return layer.config._experts_implementation  # pyrefly: ignore
