"""Weights with PEFT's adapters merged in, by PEFT itself, on a copy: the live model is not touched."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import SyncError
from r3.wrappers import is_tuner, original_class


def live_choice(module: nn.Module) -> nn.Module | None:
    """The module that PEFT's `modules_to_save` wrapper `module` runs now; None if `module` is no such wrapper.

    Raises:
        SyncError: a wrapper that trains part of a module.
    """
    wrappers = _peft("peft.utils.other")
    if wrappers is None or not isinstance(module, wrappers.AuxiliaryTrainingWrapper):
        return None
    if not isinstance(module, wrappers.ModulesToSaveWrapper):
        raise SyncError(
            f"PEFT's {type(module).__name__} cannot be merged on the fly: use modules_to_save, or LoRA of the layer"
        )
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def tuned_module(module: Any) -> nn.Module:
    """The layer that the tuner wraps.

    Raises:
        SyncError: this kind of tuner does not merge, or there are others below it.
    """
    if not callable(getattr(module, "merge", None)):
        raise SyncError(
            f"PEFT's {type(module).__name__} has no merge: its weights cannot be sent; send the adapter alone"
        )
    bare = module.get_base_layer()
    if any(is_tuner(child) for child in bare.modules()):
        raise SyncError(f"an adapter lies on top of others below it ({type(bare).__name__}): not supported")
    return bare


@torch.no_grad()
def merged(module: Any, gather: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """A copy of the layer that the tuner `module` wraps, with its active adapters merged as `merge_and_unload` does.

    Holds one layer and its adapters, whole: of fused experts, all experts of a decoder layer. None where another rank
    keeps what is gathered, and merges.

    Args:
        module: the tuner, which is not changed.
        gather: returns the full tensor of a shard or of a whole tensor; is called for each weight, in an order of its
            own that is the same on all ranks.
    """
    twin: Any = _twin(module, gather)
    if any(tensor.is_meta for tensor in twin.parameters()):
        return None
    if hasattr(twin, "unload_and_optionally_merge_module"):
        return twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    twin.merge(safe_merge=False, adapter_names=None)
    return twin.get_base_layer()


def _twin(module: nn.Module, gather: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `module` that merges as it does, and shares neither weights nor the lists of merged adapters."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()
    twin: Any = object.__new__(original_class(module))
    containers = (list, dict, set)
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, containers) else v for k, v in module.__dict__.items()}

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else gather(tensor).clone()

    twin._parameters = {
        name: None if tensor is None else nn.Parameter(of(tensor), requires_grad=False)  # pyrefly: ignore
        for name, tensor in module._parameters.items()
    }
    twin._buffers = {name: of(tensor) for name, tensor in module._buffers.items()}
    twin._modules = {name: None if child is None else _twin(child, gather) for name, child in module._modules.items()}
    return twin


def _peft(name: str) -> Any:
    """A module of PEFT, or None if PEFT is not loaded: the model then has no adapters."""
    return sys.modules.get(name)
