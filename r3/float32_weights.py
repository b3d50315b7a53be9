"""Which weights transformers keeps in float32 whatever a model's dtype, and whether FSDP2 computes with them as such.

The list is transformers' own, family by family: the gates of most routers are on it from transformers 5.24 on.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn


def kept_in_float32(model: nn.Module) -> re.Pattern:
    """Is found in the name of each weight that `model`, one of transformers, keeps in float32 when it is bfloat16."""
    patterns = sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(patterns).replace("*", ".*") or "(?!)")


def float32_gates(model: nn.Module) -> Iterator[nn.Module]:
    """The routers of `model` whose weights transformers keeps in float32, all of them.

    Routers are called, so that FSDP2 can gather one as a unit of its own. Of other modules on transformers' list the
    model may take the weights without calling them (convolutions of linear attention).
    """
    kept = kept_in_float32(model)
    for path, block in model.named_modules():
        for name in ("gate", "router"):
            router = block._modules.get(name)
            if router is None or "experts" not in block._modules:
                continue
            weights = [f"{path}.{name}.{own}" for own, _ in router.named_parameters()]
            if weights and all(kept.search(weight) for weight in weights):
                yield router


def computes_in_float32(shard: nn.Module | None) -> bool:
    """Whether a forward uses float32 weights as they are: unless `shard`, the FSDP2 module around them, casts them."""
    if shard is None:
        return True
    # FSDP2 has no public way to ask for the policy.
    return shard._get_fsdp_state()._mp_policy.param_dtype in (None, torch.float32)  # pyrefly: ignore
