"""vLLM's own model classes for models with vision, built on the CPU without an engine, and what their loaders take.

To be used in a process of its own, as `vllm_models`.
"""

import dataclasses
import importlib.util
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor, nn
from zoo.families import CASES


def _case(name: str, **text: Any) -> Any:
    return dataclasses.replace(CASES[name], text=CASES[name].text | text)


# Families with vision that vLLM 0.30 builds on the CPU -> (case, what their text configuration must say besides).
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    # 2I == H: the shape of its experts does not say how they lie.
    "qwen3_vl_moe": (_case("qwen3_vl_moe"), dict(norm_topk_prob=True)),
    "glm4v_moe": (_case("glm4v_moe"), dict(head_dim=16, use_qk_norm=False)),
    "qwen3_5_moe": (
        _case("qwen3_5_moe"),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}),
    ),
    "llama4": (
        _case("llama4", num_hidden_layers=2, moe_layers=[1], interleave_moe_layer_step=2),
        dict(),
    ),
}


def turned(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers saves of Qwen3-VL-MoE as it is published: experts as [E, H, 2I] and [E, I, H]."""
    experts = (".experts.gate_up_proj", ".experts.down_proj")
    return {n: t.transpose(1, 2).contiguous() if n.endswith(experts) else t for n, t in saved.items()}


def build(name: str, dtype: Any, **text: Any) -> nn.Module:
    """The family's transformers model, with a configuration that vLLM takes too."""
    case, besides = FAMILIES[name]
    model = dataclasses.replace(case, text=case.text | text).build(dtype)
    for key, value in besides.items():
        setattr(model.config.text_config, key, value)
    return model


@contextmanager
def importable():
    """vLLM's classes can be imported: with vision they want torchvision, whose builds want CUDA beside a CPU's torch.

    It only resizes images, and none is here: what stands in for it can be imported, and no more.
    """
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            module: Any = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
            module.functional, module.InterpolationMode = mock.MagicMock(), mock.MagicMock()
            sys.modules.setdefault(name, module)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)
    from vllm.model_executor.models import registry

    # As it does in another process, which has no such stand-in.
    with mock.patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()):
        yield
