"""A small copy of a model: its own code on random weights, which neither meta tensors nor shards disturb."""

import copy
from collections import OrderedDict
from functools import partial
from types import MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ParallelError
from r3.own_methods import ASIDE, code_of, on_copy
from r3.wrappers import original_class, unwrapped

_NUM_LAYERS = "num_hidden_layers"


def small_copy(model: Any) -> Any:
    """A copy of `model`, a transformers model, that computes as it does. Equal on all ranks, whatever they hold.

    Weights are random, and take next to no memory: they are windows into a few random numbers. Decoder layers are kept
    up to the one after which only layers like earlier ones come. Hooks, and wrappers of modules, are left out.

    The copy is on the model's GPU, since its kernels may run nowhere else; on the CPU where it has none yet.

    Raises:
        ParallelError: a module's forward was replaced by a function that cannot be called on a copy.
    """
    held = {tensor.device for tensor in model.parameters()}
    device = next((device for device in held if device.type not in ("cpu", "meta")), torch.device("cpu"))
    return _Copy(model, device).of(model)


class _Copy:
    """One copy of a model. `_memo` has what stands for each object of the model, by id."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)
        self._memo: dict[int, Any] = {}
        self._dropped: set[int] = set()
        decoder = model.get_decoder()
        config = decoder.config
        number = getattr(config, _NUM_LAYERS, None)
        for layers in decoder.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == number:
                kinds = [_kind(layer) for layer in layers]
                kept = max(kinds.index(kind) for kind in kinds) + 1
                self._dropped.update(map(id, list(layers)[kept:]))
                self._memo[id(config)] = shorter = copy.copy(config)
                shorter.__dict__[config.attribute_map.get(_NUM_LAYERS, _NUM_LAYERS)] = kept

    def of(self, value: Any) -> Any:
        """What stands for `value` in the copy: itself, if it holds nothing of the model."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, Tensor):
            self._memo[id(value)] = found = self._random(value)
            return found
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, partial):
            return partial(self.of(value.func), *map(self.of, value.args), **self._entries(value.keywords))
        if type(value) in (list, tuple, set):
            return type(value)(map(self.of, value))
        if type(value) in (dict, OrderedDict):
            return type(value)(self._entries(value))
        return value

    def _entries(self, named: dict) -> dict:
        return {name: self.of(value) for name, value in named.items() if id(value) not in self._dropped}

    def _module(self, module: nn.Module) -> nn.Module:
        inner = unwrapped(module)
        if inner is not module:
            self._memo[id(module)] = found = self.of(inner)
            return found
        code = code_of(module, "forward")
        if code is None:
            raise ParallelError(
                f"`forward` was put on this {type(module).__name__} itself, is not bound to it and wraps nothing that "
                "is, so that no copy can run it: bind it with types.MethodType"
            )
        self._memo[id(module)] = replica = object.__new__(original_class(module))
        replica.__dict__.update(nn.Module().__dict__)
        replica.__dict__ |= self._entries({name: value for name, value in vars(module).items() if "_hooks" not in name})
        replica.__dict__ |= {"training": False, "_compiled_call_impl": None} | _of_all_experts(module)
        aside = replica.__dict__.get(ASIDE)  # what the class calls where replay is attached
        on_copy(replica, "forward", code)
        if aside is not None:
            replica.__dict__[ASIDE] = aside
        return replica

    def _random(self, tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device=self._device)
        strides = _overlapping(shape)
        needed = 1 + sum(stride * max(size - 1, 0) for stride, size in zip(strides, shape, strict=True))
        numbers = torch.randn(needed, generator=self._generator, dtype=torch.float32, device="cpu")
        if len(shape) > 1:  # outputs as large as inputs, whatever the width
            numbers *= shape[-1] ** -0.5
        values = numbers.to(self._device, tensor.dtype).as_strided(shape, strides)
        return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _overlapping(shape: torch.Size) -> list[int]:
    """Strides by which rows, and the matrices of experts, begin a few numbers after one another: no two are equal.

    The matrices themselves are contiguous, and begin where kernels for grouped products want it.
    """
    if len(shape) < 3:
        return [7, 1][2 - len(shape) :]
    return [64 * (back + 1) for back in reversed(range(len(shape) - 2))] + [shape[-1], 1]


def _of_all_experts(module: nn.Module) -> dict[str, Any]:
    """What a copy with the experts of all ranks has in place of a rank's own: transformers counts those it holds."""
    if not getattr(module, "_is_expert_parallel", False):
        return {}
    return {"_is_expert_parallel": False, "num_experts": next(module.parameters(recurse=False)).shape[0]}


def _kind(layer: nn.Module) -> tuple:
    """Key of layers that compute alike: modules, shapes and settings. Numbers do not count: each layer has its own."""
    settings = (bool, float, str, NoneType)
    return tuple(
        (
            path,
            original_class(module),
            tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)),
            tuple((name, value) for name, value in vars(module).items() if type(value) in settings),
        )
        for path, module in layer.named_modules()
    )
