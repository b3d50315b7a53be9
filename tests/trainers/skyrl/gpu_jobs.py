"""What each rank with a GPU of its own runs: SkyRL's worker with its FSDP strategy and NCCL."""

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist
from places import DEMO_MODEL
from rollouts import settings, training_batch

from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorkerBase

FLOAT32 = (
    "trainer.policy.fsdp_config.mixed_precision.param_dtype=fp32",
    "trainer.policy.fsdp_config.mixed_precision.buffer_dtype=fp32",
)
FLASH = ("trainer.flash_attn=true", "trainer.remove_microbatch_padding=true")


def policy(sequence_parallel_size: int, more: tuple[str, ...], exact: bool) -> tuple:
    """Old log-probabilities, those of training, the gradients' norm, and log-probabilities after a step.

    Args:
        sequence_parallel_size: ranks that share a sample's tokens; the others share the samples.
        more: settings.
        exact: without SkyRL's autocast to bfloat16, which would hide small differences.
    """
    cfg = settings(f"trainer.policy.sequence_parallel_size={sequence_parallel_size}", *more)
    rank, size = dist.get_rank(), dist.get_world_size()
    worker = RoutingReplayPolicyWorkerBase(
        cfg=cfg.trainer,
        world_size=size,
        rank=rank,
        local_rank=rank,
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        sequence_parallel_size=sequence_parallel_size,
    )
    os.environ["LOCAL_RANK"] = str(rank)  # the worker takes Ray to show it one GPU, as number 0
    worker._set_expandable_segments = lambda on: None  # other tests of this process want the usual allocator
    worker.init_worker_process_group()
    worker.init_model(str(DEMO_MODEL), num_training_steps=2)
    batch = training_batch(cfg)
    ranks = worker.mesh_rank
    part = batch.chunk(len(batch) // ranks.dp_size)[ranks.dp]
    with _float32() if exact else contextlib.nullcontext():
        old = [row["logprobs"] for row in worker.forward(part).loss_fn_outputs]
        output = worker.forward_backward(part)
        norm = worker.optim_step()
        after = [row["logprobs"] for row in worker.forward(part).loss_fn_outputs]
    return old, [row["logprobs"] for row in output.loss_fn_outputs], norm, after


def _float32() -> contextlib.AbstractContextManager:
    """SkyRL's methods ask torch for autocast."""
    return mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext())
