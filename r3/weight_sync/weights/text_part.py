"""Text-only models of multimodal families, whose checkpoints hold the text part under another path and layout."""

import copy
import sys
from typing import Any

import torch

from r3.wrappers import original_class

_HEADS = ("ForConditionalGeneration", "ForCausalLM")


def whole_of(inner: Any) -> tuple[Any, str] | None:
    """The multimodal model whose text part is `inner`, without data, and the path of `inner` in it, ending with a dot.

    None if `inner` is no part (a configuration says that of itself), or its family has several models around it: what
    an engine calls its weights is then not known here.
    """
    from transformers import PreTrainedModel

    part = original_class(inner)
    if getattr(inner.config, "base_config_key", "") != "text_config" or part.__name__.endswith(_HEADS):
        return None
    family = [
        cls
        for cls in vars(sys.modules[part.__module__]).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == part.__module__
    ]
    around = [cls for cls in family if cls.__name__.endswith(_HEADS) and _has_text_of(cls, type(inner.config))]
    if len(around) != 1:
        return None
    with torch.device("meta"):
        whole_model = around[0](around[0].config_class(text_config=copy.deepcopy(inner.config)))  # pyrefly: ignore
    paths = [name for name, module in whole_model.named_modules() if type(module) is part]
    return (whole_model, f"{paths[0]}.") if len(paths) == 1 else None


def _has_text_of(cls: Any, config: type) -> bool:
    return cls.config_class is config or (cls.config_class.sub_configs or {}).get("text_config") is config
