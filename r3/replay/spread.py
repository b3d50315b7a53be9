"""What transformers and PEFT themselves get wrong in a model that is spread over ranks: refused by name.

Each was seen without r3, in transformers 5.23 and 5.24 and PEFT 0.21, two ranks against one:
docs/reference/parallel.md.
"""

from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from r3.errors import UnsupportedModelError
from r3.releases import gathers_split_parts, has_right_expert_parallelism, trains_spread_experts
from r3.wrappers import is_tuner

_JOINED = "weights that it joins when it loads them reach the ranks in another order (convolutions), without an error"
_MASKED = (
    "its eager experts fail where those of other ranks are masked; load with experts_implementation='grouped_mm', or "
    "with ep_implementation='all_to_all'"
)
_REASONS = {
    ("bailing_hybrid", "fsdp_size"): _JOINED,
    ("kimi_linear", "fsdp_size"): _JOINED,
    ("zaya", "fsdp_size"): "its log-probabilities are others than on one rank, without an error",
    (
        "inkling2_text",
        "tp_size",
    ): "the experts' gate and up weights have wrong gradients, without an error; set ep_size",
    ("llama4_text", "tp_size"): "its backward fails",
    ("gpt_oss", "masked"): _MASKED,
    ("nemotron_h", "masked"): _MASKED,
}


def require_right(model: nn.Module) -> None:
    """Refuse a model that transformers spread over ranks in a way in which it is wrong there.

    Raises:
        UnsupportedModelError: names the family, the setting and the release; or adapters on experts of some ranks.
    """
    for path, module in model.named_modules():
        if is_tuner(module) and _adapts_all_experts(module):
            raise UnsupportedModelError(
                f"{path}: PEFT adapts experts that expert parallelism spreads over ranks, and computes with those of "
                "all ranks. Call r3.parallel.spread_adapters(model) first"
            )
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    layout: Any = getattr(getattr(found, "config", None), "distributed_config", None)
    if found is None or layout is None:
        return
    text = found.config.get_text_config()
    sizes = ", ".join(f"{n}={getattr(layout, n, 1)}" for n in ("fsdp_size", "tp_size", "ep_size"))
    where = f"{type(found).__name__} ({text.model_type}) spread over ranks by transformers {transformers.__version__}"
    if not trains_spread_experts() and getattr(layout, "enable_expert_parallel", False):
        raise UnsupportedModelError(
            f"{where} (enable_expert_parallel): gradients of routers, and of what comes before them, are wrong or NaN; "
            "5.17 or later is right"
        )
    if not has_right_expert_parallelism() and _size(layout, "fsdp_size") > 1 and _size(layout, "ep_size") > 1:
        raise UnsupportedModelError(f"{where} ({sizes}): the experts' gradients are too small; 5.23 or later is right")
    if not gathers_split_parts() and any(map(_split_in_parts, found.parameters())):
        raise UnsupportedModelError(
            f"{where} ({sizes}): torch {torch.__version__} cannot gather fused weights of which every part is sharded; "
            "2.12 or later can"
        )
    for kind in _kinds(layout, text):
        if (reason := _REASONS.get((text.model_type, kind))) is not None:
            raise UnsupportedModelError(f"{where} ({sizes}): {reason}")


def _adapts_all_experts(tuner: Any) -> bool:
    """Whether an adapter of spread experts is whole on this rank."""
    inside = tuner.get_base_layer()
    if not any(getattr(module, "_is_expert_parallel", False) for module in inside.modules()):
        return False
    adapters = [weight for name, weight in tuner.named_parameters() if not name.startswith("base_layer.")]
    return not all(isinstance(weight, DTensor) for weight in adapters)


def _split_in_parts(parameter: Any) -> bool:
    """Whether the one dimension of a mesh shards each part of a fused weight (`_StridedShard`)."""
    placements = getattr(parameter, "placements", ())
    return len(placements) == 1 and hasattr(placements[0], "split_factor")


def _size(layout: Any, name: str) -> int:
    return getattr(layout, name, None) or 1


def _kinds(layout: Any, text: Any) -> list[str]:
    tensor, expert = _size(layout, "tp_size"), _size(layout, "ep_size")
    kinds = ["fsdp_size"] if _size(layout, "fsdp_size") > 1 else []
    if tensor > 1 and expert == 1:
        kinds.append("tp_size")
    all_reduce = getattr(layout, "ep_implementation", "") in ("auto", "all_reduce")
    if tensor == expert > 1 and all_reduce and getattr(text, "_experts_implementation", "") == "eager":
        kinds.append("masked")
    return kinds
