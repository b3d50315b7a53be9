"""What may stand around a model or parts of it: torch.compile, activation checkpointing, FSDP, PEFT."""

import sys

from torch import nn

COMPILED = "_orig_mod"
CHECKPOINTED = "_checkpoint_wrapped_module"
FSDP1 = "_fsdp_wrapped_module"
WRAPPERS = (COMPILED, CHECKPOINTED, FSDP1)
"""Children by which wrappers hold what they wrap: components of a path that the bare model does not have."""

FLATTENED = (
    "FullyShardedDataParallel (FSDP1) has flattened the weights, so that nothing can be proved of this model: attach "
    "before FullyShardedDataParallel wraps it, or use fully_shard (FSDP2), before or after which attach works"
)


def own_path(path: str) -> str:
    """`path` of a module or weight as the bare model has it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of checkpointing, FSDP1 and torch.compile."""
    while len(children := dict(module.named_children())) == 1 and children.keys() & set(WRAPPERS):
        (module,) = children.values()
    return module


def flattened(model: nn.Module) -> bool:
    """Whether FSDP1 wraps `model` or a part of it: its weights are then in flat shards, without shapes of their own."""
    return any(FSDP1 in module._modules for module in model.modules())


def original_class(module: object) -> type:
    """The class of `module` before `fully_shard` put one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def is_tuner(module: nn.Module) -> bool:
    """Whether `module` is a layer with adapters of PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # made the layer, if it is one of PEFT's
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
