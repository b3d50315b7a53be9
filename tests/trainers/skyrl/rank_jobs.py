"""What each of two ranks runs: SkyRL's own worker, strategy and slicing, on the CPU.

SkyRL writes "cuda" into its device mesh and where it spreads buffers; here these say "cpu". Attention on slices is
SkyRL's, around a plain attention in place of the flash attention that a CPU lacks.
"""

import stand_ins
import torch
import torch.distributed as dist
from places import DEMO_MODEL
from rollouts import of_samples, settings, training_batch
from skyrl.backends.skyrl_train.distributed import fsdp_utils
from skyrl.backends.skyrl_train.distributed.ulysses import monkey_patch
from skyrl.backends.skyrl_train.distributed.ulysses import utils as slices
from torch.distributed.device_mesh import init_device_mesh
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from workers import Strategy, bare_worker, wrapper

from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorkerBase


def sharded():
    """`init_model` as it is, with FSDP over two ranks, the second's model made on meta; then forwards and a step."""
    _on_cpu()
    cfg = settings("trainer.policy.fsdp_config.mixed_precision.param_dtype=fp32")
    worker = bare_worker(RoutingReplayPolicyWorkerBase, cfg)
    worker._set_expandable_segments = lambda on: None
    worker.init_model(str(DEMO_MODEL), num_training_steps=2)
    worker.device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "sp"))
    worker.mesh_rank.dp_size = 2
    layers = [module for module in worker.model.modules() if type(module).__name__.startswith("FSDP")]
    batch = training_batch(cfg)
    part = batch.chunk(len(batch) // 2)[dist.get_rank()]
    old = [row["logprobs"] for row in worker.forward(part).loss_fn_outputs]
    worker.strategy.all_reduce = Strategy().all_reduce
    output = worker.forward_backward(part)
    norm = worker.optim_step()
    after = [row["logprobs"] for row in worker.forward(part).loss_fn_outputs]
    return old, [row["logprobs"] for row in output.loss_fn_outputs], norm, len(layers), after


def sliced(packed):
    """SkyRL's forward of a whole micro-batch, each rank with its slice of the tokens."""
    _on_cpu()
    cfg = settings()
    worker = bare_worker(RoutingReplayPolicyWorkerBase, cfg)
    worker.sequence_parallel_size = 2
    worker.device_mesh = {"sp": init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))}
    model = wrapper(packed, sequence_parallel_size=2)
    worker._seq_parallel_monkey_patch(model=model.model)
    model.model.set_attn_implementation(_sliced_attention())
    worker.model = model
    batch = training_batch(cfg)
    old = torch.tensor([row["logprobs"] for row in worker.forward(batch).loss_fn_outputs])
    worker.device_mesh = bare_worker(RoutingReplayPolicyWorkerBase, cfg).device_mesh
    output = worker.forward_backward(batch)
    trained = [torch.tensor(row["logprobs"]) for row in output.loss_fn_outputs[:6]]
    return of_samples(batch, old), trained


def _on_cpu():
    stand_ins.methods_on_cpu()
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None
    fsdp_utils.init_device_mesh = lambda device, **options: init_device_mesh("cpu", **options)
    fsdp_utils._sync_non_persistent_buffers = _spread_buffers


def _spread_buffers(model, loaded):
    for module in model.modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer
            dist.broadcast(module._buffers[name], src=0)


def _sliced_attention() -> str:
    def plain(query, key, value, attention_mask, *args, position_ids, **kwargs):
        # [B, S, H, D], of whole rows; a sequence begins where positions do not rise.
        starts = torch.cat([position_ids[:, :1] * 0, (position_ids.diff() != 1).long()], 1).cumsum(1)
        allowed = (starts[:, :, None] == starts[:, None, :]).tril()
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed[:, None], enable_gqa=True)
        return out.transpose(1, 2)

    def attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        return monkey_patch._ulysses_flash_attention_forward(*heads, position_ids=position_ids), None

    def all_to_all(local, scatter_dim, gather_dim, group=None, async_op=False):
        """gloo has none of tensors' lists."""
        parts = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(parts, local.contiguous(), group=group)
        mine = [part.tensor_split(2, scatter_dim)[dist.get_rank(group)] for part in parts]
        return torch.cat(mine, gather_dim).contiguous()

    monkey_patch._flash_attention_forward = plain
    slices.all_to_all_tensor = all_to_all
    ALL_ATTENTION_FUNCTIONS.register("sliced_on_cpu", attention)
    return "sliced_on_cpu"
