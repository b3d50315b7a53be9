"""LoRA of a model that transformers spread over ranks: each rank holds the adapters of its own experts.

PEFT adapts fused experts by their parameters (`LoraConfig(target_parameters=["mlp.experts.gate_up_proj", ...])`), those
of a layer in two matrices, `lora_A` `[E * r, in]` and `lora_B` `[out, r * E]`, whose product it adds to the parameter
before the experts are called. Here, FSDP2 gathers the parameter only then, and a rank has but its own experts: so it is
added in between.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from r3.errors import ParallelError
from r3.releases import gathers_split_parts
from r3.wrappers import is_tuner


def spread_adapters(model: nn.Module) -> None:
    """Have the adapters of a PEFT model, whose base transformers spread over ranks, train as those of one process.

    Adapters of experts become DTensors, sharded as the experts are: each rank computes with those of its own. All
    others stay whole on each rank. The backward averages gradients of both over all ranks, as FSDP2 does those of other
    parameters. All ranks get the values of the first.

    Every rank calls this once: after `get_peft_model` or `PeftModel.from_pretrained`, before `r3.attach` and the
    optimizer. `adapter_weights(model).save(folder)` then writes what one process would.

    Args:
        model: a `PeftModel` over what `load_expert_parallel` returns.

    Raises:
        ParallelError: there are no adapters, or this was called before; the base is not spread over ranks, or by tensor
            parallelism; experts are adapted otherwise than by LoRA of their parameters; the release of torch cannot
            gather the adapters.
    """
    tuners = {path: module for path, module in model.named_modules() if is_tuner(module)}
    if not tuners:
        raise ParallelError(f"expected a model with adapters of PEFT, got {type(model).__name__} without any")
    _require_spread(model)
    of_experts = [tuner for path, tuner in tuners.items() if _adapts_spread_experts(path, tuner)]
    for tuner in of_experts:
        _shard(tuner)
    for tuner in tuners.values():
        for weight in _adapters(tuner):
            if not isinstance(weight, DTensor):
                dist.broadcast(weight.data, 0)
            trains = weight.requires_grad
            weight.requires_grad_(True).register_hook(_mean_over_ranks)
            weight.requires_grad_(trains)


def _require_spread(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    base: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    layout = getattr(getattr(base, "config", None), "distributed_config", None)
    if layout is None or (layout.tp_size or 1) > 1:
        got = "a model on one rank" if layout is None else f"tp_size={layout.tp_size}"
        raise ParallelError(f"expected adapters of a model that load_expert_parallel spread over ranks, got {got}")


def _adapts_spread_experts(path: str, tuner: Any) -> bool:
    experts = tuner.get_base_layer()
    if not getattr(experts, "_is_expert_parallel", False):
        return False
    if not hasattr(tuner, "parameter_name") or not hasattr(tuner, "_activate_lora"):
        raise ParallelError(
            f"{path}: expected LoRA of the experts' parameters (target_parameters) by PEFT 0.21, got "
            f"{type(tuner).__name__} of PEFT {sys.modules['peft'].__version__}"
        )
    if any(isinstance(weight, DTensor) for weight in _adapters(tuner)):
        raise ParallelError(f"{path}: spread_adapters was called for this model before")
    if not gathers_split_parts():
        raise ParallelError(
            f"{path}: torch {torch.__version__} cannot gather adapters of experts that are sharded; 2.12 or later can"
        )
    if isinstance(experts, FSDPModule):
        experts.reshard()
    return True


def _adapters(tuner: nn.Module) -> list[nn.Parameter]:
    """The parameters of `tuner` itself, without those of what it wraps."""
    return [weight for name, child in tuner.named_children() if name != "base_layer" for weight in child.parameters()]


def _shard(tuner: Any) -> None:
    """Shard the adapters of a `ParamWrapper` over the ranks that share the experts under it."""
    parameter = tuner.get_param()
    mesh, experts_over = parameter.device_mesh, parameter.placements[-1]
    if experts_over != Shard(0):  # the last dimension of the mesh; those before it are FSDP2's
        raise ParallelError(f"{tuner.parameter_name}: expected experts sharded in order, got {parameter.placements}")
    for name in tuner.lora_A:
        # Of an expert, lora_A has r rows that follow one another, lora_B each E-th column.
        for side, over in ((tuner.lora_A, Shard(0)), (tuner.lora_B, _StridedShard(1, split_factor=tuner.r[name]))):
            whole = side[name].weight
            placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [over]
            sharded = distribute_tensor(whole.data, mesh, placements)
            side[name].weight = nn.Parameter(sharded, requires_grad=whole.requires_grad)
    tuner._activate_lora = partial(_adapting_local_experts, tuner)


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    """Of a rank's gradient; a sharded one comes from all ranks that send tokens to its experts."""
    mean = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    mean = mean / dist.get_world_size()
    if not isinstance(gradient, DTensor):
        dist.all_reduce(mean)
        return mean
    mesh, placements = gradient.device_mesh, gradient.placements
    for at in (at for at, placement in enumerate(placements) if placement == Replicate()):
        dist.all_reduce(mean, group=mesh.get_group(at))
    return DTensor.from_local(mean, mesh, placements, run_check=False, shape=gradient.shape, stride=gradient.stride())


@contextlib.contextmanager
def _adapting_local_experts(tuner: Any, adapters: Sequence[str]) -> Iterator[None]:
    """What `tuner` has in place of PEFT's `_activate_lora`: context in which its experts run adapted."""
    experts, name, before = tuner.get_base_layer(), tuner.parameter_name, []

    # Runs once FSDP2 has gathered the parameter, and before transformers takes the local part of it.
    def adapt(_module: nn.Module, _args: Any) -> None:
        weight = experts._parameters[name]
        before.append(weight)
        for adapter in (each for each in adapters if each in tuner.lora_A):
            weight = _adapted(tuner, adapter, weight)
        experts._parameters[name] = weight

    def restore(_module: nn.Module, _args: Any, _output: Any) -> None:
        if before:
            experts._parameters[name] = before.pop()

    handles = [
        experts.register_forward_pre_hook(adapt),
        experts.register_forward_hook(restore, prepend=True, always_call=True),  # before FSDP2 frees the parameter
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapted(tuner: Any, adapter: str, weight: Any) -> Tensor:
    """`weight` `[E, ...]` with `adapter` added, each as a rank holds them. For expert e, PEFT adds
    `scaling * lora_B[:, e::E] @ lora_A[e * r : (e + 1) * r]`, transposed where the experts are."""
    down, up = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
    if isinstance(weight, DTensor):
        if not isinstance(down, DTensor):
            raise ParallelError(f"adapter {adapter!r} was added after spread_adapters, which has to see all")
        local = _adapted_local(tuner, adapter, weight.to_local(), down.to_local(), up.to_local())
        return DTensor.from_local(
            local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    return _adapted_local(tuner, adapter, weight, down, up)


def _adapted_local(tuner: Any, adapter: str, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    down = down.unflatten(0, (len(weight), -1)).to(weight.dtype)  # [E, r, in]
    up = up.unflatten(1, (-1, len(weight))).permute(2, 0, 1).to(weight.dtype)  # [E, out, r]
    transposed = getattr(tuner.get_base_layer(), "is_transposed", False)
    left, right = (down.mT, up.mT) if transposed else (up, down)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight, left, right, alpha=tuner.scaling[adapter])
