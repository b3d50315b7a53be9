"""Which expert layers of transformers `grouped_experts` computes."""

from torch import nn
from torch.nn.functional import silu

_DECORATED = ("has_gate", "has_bias", "is_transposed")


def expert_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, layer) of every expert layer that transformers' registry of experts functions reaches."""
    return [(path, module) for path, module in model.named_modules() if all(hasattr(module, n) for n in _DECORATED)]


def unfit(experts: nn.Module) -> str:
    """What an expert layer of transformers has that `grouped_experts` does not compute; empty if nothing."""
    reasons = {
        "experts without a gate": not experts.has_gate,
        "biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "interleaved gate and up weights": not getattr(experts, "is_concatenated", True),
        "a norm after the experts": getattr(experts, "has_post_expert_norm", False),
        f"a gate of its own, {type(experts).__name__}._apply_gate": not _plain_gate(experts),
        f"the activation {_name(experts)}": _plain_gate(experts) and not _is_silu(experts),
    }
    return ", ".join(reason for reason, found in reasons.items() if found)


def _plain_gate(experts: nn.Module) -> bool:
    """Whether `_apply_gate` is the one that transformers' decorator gives to a class without one."""
    gate = getattr(type(experts), "_apply_gate", None)
    return getattr(gate, "__module__", "") == "transformers.integrations.moe"


def _is_silu(experts: nn.Module) -> bool:
    activation = getattr(experts, "act_fn", None)
    return activation is silu or isinstance(activation, nn.SiLU) or _name(experts) == "SiLUActivation"


def _name(experts: nn.Module) -> str:
    activation = getattr(experts, "act_fn", None)
    return getattr(activation, "__name__", type(activation).__name__)
