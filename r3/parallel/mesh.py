"""FSDP2 x Ulysses on one device mesh: who shares rows, and over whom parameters are sharded."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from r3.errors import ParallelError
from r3.float32_weights import float32_gates


@dataclass(frozen=True, eq=False)
class Mesh:
    """All ranks as data x sequence: consecutive ranks share rows.

    Attributes:
        device_mesh: of dimensions `data` and `sequence`.
        data_rank, data_size: which part of the batch is this rank's, of how many.
        sequence_rank, sequence_size: which slice of those rows, of how many.
    """

    device_mesh: DeviceMesh

    @property
    def data_rank(self) -> int:
        return self.device_mesh.get_local_rank("data")

    @property
    def data_size(self) -> int:
        return self.device_mesh["data"].size()

    @property
    def sequence_rank(self) -> int:
        return self.device_mesh.get_local_rank("sequence")

    @property
    def sequence_size(self) -> int:
        return self.device_mesh["sequence"].size()

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Ranks that share rows; None where each has its own."""
        return self.device_mesh.get_group("sequence") if self.sequence_size > 1 else None


def make_mesh(device_type: str, sequence_parallel_size: int = 1) -> Mesh:
    """All ranks of the job, in groups of `sequence_parallel_size` that share rows.

    Raises:
        ParallelError: the groups do not divide the ranks.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = make_mesh("cpu")
        >>> mesh.data_size, mesh.sequence_size
        (1, 1)
        >>> dist.destroy_process_group()
    """
    world = dist.get_world_size()
    if sequence_parallel_size < 1 or world % sequence_parallel_size:
        raise ParallelError(
            f"sequence_parallel_size: expected a divisor of the {world} ranks, got {sequence_parallel_size}"
        )
    shape = (world // sequence_parallel_size, sequence_parallel_size)
    return Mesh(init_device_mesh(device_type, shape, mesh_dim_names=("data", "sequence")))


def shard_parameters(model: nn.Module, mesh: Mesh, *, param_dtype: torch.dtype) -> nn.Module:
    """FSDP2 over all ranks, data and sequence: each decoder layer a unit, and a head with a weight of its own.

    Routers whose weights transformers keeps in float32 (`_keep_in_fp32_modules_strict`: of ERNIE 4.5, and from 5.24 on
    of DeepSeek, GLM and many others) are units of their own, which compute with float32, as `named_weights` sends them.

    Logits that the model returns are in `param_dtype`. Log-probabilities come from `fused_head`, attached before: it
    sums the products of the head in float32, as the engine does.

    On several GPUs accelerate does it, as for any trainer that a launcher starts. Torch's `fully_shard` does it on the
    CPU, where accelerate wraps with DDP instead, and in a single process, which accelerate leaves whole.

    Args:
        model: a transformers model with float32 parameters, on its device.
        mesh: from `make_mesh`.
        param_dtype: of forward and backward; gradients are reduced in float32.

    Raises:
        ParallelError: accelerate did not shard the model with FSDP2.
    """
    device_type = mesh.device_mesh.device_type
    low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    flat = mesh.device_mesh._flatten("fsdp") if mesh.device_mesh.size() > 1 else mesh.device_mesh["data"]
    head = model.get_output_embeddings()  # pyrefly: ignore
    if head.weight is not model.get_input_embeddings().weight:  # pyrefly: ignore
        # So that it is whole only while it is used, and its gradient is reduced before the layers'.
        fully_shard(head, mesh=flat, mp_policy=low)
    if param_dtype != torch.float32:
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for router in float32_gates(model):
            fully_shard(router, mesh=flat, mp_policy=full)
    if device_type == "cuda" and mesh.device_mesh.size() > 1:
        return _accelerated(model, low)
    names = set(model._no_split_modules)  # pyrefly: ignore
    for module in list(model.modules()):
        if _name(module) in names:
            fully_shard(module, mesh=flat, mp_policy=low)
    fully_shard(model, mesh=flat, mp_policy=low)
    return model


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _accelerated(model: nn.Module, policy: MixedPrecisionPolicy) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(model._no_split_modules),  # pyrefly: ignore
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    # It shards a model only together with an optimizer; the trainer's is made afterwards, of sharded parameters.
    unused = torch.optim.SGD(model.parameters(), lr=0.0)
    accelerator = Accelerator(fsdp_plugin=plugin)
    # All accelerators of a process share one state, with the plugin of the first: a second model would silently get the
    # first one's layer classes and dtypes.
    shared, accelerator.state.fsdp_plugin = accelerator.state.fsdp_plugin, plugin
    try:
        prepared, _ = accelerator.prepare(model, unused)
    finally:
        accelerator.state.fsdp_plugin = shared
    if not isinstance(prepared, FSDPModule):
        raise ParallelError(f"accelerate was to shard {type(model).__name__} with FSDP2, it returned {type(prepared)}")
    return prepared
