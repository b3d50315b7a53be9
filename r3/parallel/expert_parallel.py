"""A model whose experts are spread over ranks, as transformers loads it, with FSDP2 over all ranks.

transformers does all of the work: each rank reads its own shards of the checkpoint, and tokens go to the ranks of their
experts by all-to-all. FSDP2 shards the rest over all ranks, and the experts over the ranks that hold the same ones.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist

from r3.errors import ParallelError
from r3.float32_weights import float32_gates
from r3.releases import has_right_expert_parallelism

logger = logging.getLogger("r3")

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def num_experts(config: Any) -> int | None:
    """The experts of a layer that `config`, of a transformers text model, names; None if it names none."""
    found = (getattr(config, name, None) for name in _NUM_EXPERTS)
    return next((count for count in found if isinstance(count, int)), None)


def load_expert_parallel(path: str, size: int, *, param_dtype: torch.dtype) -> Any:
    """The causal language model at `path` over all ranks of the job, its experts spread over `size` consecutive ones.

    Each rank has rows of its own, or with `ulysses` slices of its own. Attach replay, `fused_head` and `ulysses`
    afterwards. Clip with `clip_grad_norm`, and give an optimizer `parameter_groups`.

    Args:
        path: a checkpoint.
        size: ranks that together hold every expert; `1` leaves FSDP2 over all ranks.
        param_dtype: of forward and backward, bfloat16 or float32; parameters and the reduction of gradients are
            float32.

    Raises:
        ParallelError: `size` divides the ranks or the experts not; the release of transformers has no expert
            parallelism beside FSDP2, or it has none for this family.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    world = dist.get_world_size()
    if not has_right_expert_parallelism():
        raise ParallelError(
            f"expert parallelism beside FSDP2: expected transformers 5.23 or later, got {transformers.__version__}"
        )
    if param_dtype not in (torch.bfloat16, torch.float32):
        raise ParallelError(f"param_dtype: expected bfloat16 or float32, got {param_dtype}")
    if size < 1 or world % size:
        raise ParallelError(f"expert_parallel_size: expected a divisor of the {world} ranks, got {size}")
    experts = num_experts(AutoConfig.from_pretrained(path).get_text_config())
    if experts is not None and experts % size:
        raise ParallelError(f"expert_parallel_size: expected a divisor of the {experts} experts of {path}, got {size}")
    layout = DistributedConfig(
        fsdp_size=world,
        ep_size=size,
        ep_implementation="all_to_all",
        fsdp_mixed_precision=param_dtype == torch.bfloat16,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=layout)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"transformers {transformers.__version__} cannot spread the model at {path} over {world} ranks, its "
            f"experts over {size}: {error}"
        ) from error
    if param_dtype != torch.float32 and any(float32_gates(model)) and dist.get_rank() == 0:
        logger.warning(
            "%s: transformers shards routers with the rest under expert parallelism, so that those that it keeps in "
            "float32 otherwise compute with %s here, and are sent rounded",
            type(model).__name__,
            str(param_dtype).removeprefix("torch."),
        )
    return model
