"""Differences between releases of vLLM in capture."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch

from r3.errors import CaptureError, ConfigError
from r3.releases import TESTED

CaptureBackend = Literal["blocks", "vllm", "hooks"]


def capture_backend(*, pipeline_parallel_size: int) -> CaptureBackend:
    """How an engine of the installed vLLM captures.

    - "blocks": vLLM captures, r3's scheduler sends the rows; 0.22 to 0.30.
    - "vllm": vLLM captures and sends; 0.31 and later, with Triton.
    - "hooks": r3's worker captures, r3's scheduler sends; where vLLM refuses: with pipeline parallelism, and without
      Triton from 0.31.

    Raises:
        ConfigError: a vLLM that does not return routing by this contract, as 0.21 and before.
    """
    from vllm import SamplingParams
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer
    from vllm.triton_utils import HAS_TRITON

    if not hasattr(SamplingParams(), "routed_experts_prompt_start"):
        raise ConfigError(
            f"this vLLM returns routing by another contract, or not at all: expected {TESTED['vllm'].first} or later"
        )
    if pipeline_parallel_size > 1:
        return "hooks"
    if hasattr(routed_experts_capturer, "RoutedExpertsManager"):
        return "blocks"
    if find_spec("vllm.distributed.aux_output_connector") is None:
        raise ConfigError(
            "this vLLM captures in a way that r3 does not know: expected "
            f"{TESTED['vllm'].first} or later, below {TESTED['vllm'].beyond}"
        )
    return "vllm" if HAS_TRITON else "hooks"


def native_store(scheduler: Any) -> tuple[np.ndarray, int, int] | None:
    """The rows that vLLM's scheduler stores by KV slot (0.22 to 0.30), or None if it stores none.

    0.31 and later keep rows by block hash in the worker, as `scheduler.aux_output_connector`: there vLLM's own
    scheduler must be used.

    Returns:
        Expert ids `[slots, L, K]`, tokens a block, and the KV cache group that the blocks belong to.

    Raises:
        CaptureError: vLLM captures in another way.
    """
    manager = getattr(scheduler, "routed_experts_mgr", None)
    if manager is not None:
        return manager.routed_experts_by_slot, manager.block_size, manager.attn_gid
    if getattr(scheduler, "aux_output_connector", None) is not None:
        raise CaptureError(
            "scheduler_cls: this vLLM captures through its own connector (0.31 and later): leave out scheduler_cls, or "
            "enable_return_routed_experts"
        )
    return None


def native_rows(model_runner_output: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """(slots `[n]`, ids `[n, L, K]`) of a step that vLLM captured itself (0.22 to 0.30), taken out of the output."""
    rows = getattr(model_runner_output, "routed_experts", None)
    if rows is None:
        return None
    model_runner_output.routed_experts = None
    return rows.slot_mapping, rows.routing_data


def full_attention_group(kv_cache_config: Any) -> tuple[int, int]:
    """(index, block size) of the first KV cache group whose layers all see the whole sequence.

    `is_full_attention_spec` is there from 0.30; before it, the class of the spec says so.

    Raises:
        CaptureError: there is none, so that no block keeps its slots.
    """
    from vllm.v1 import kv_cache_interface

    is_full = getattr(
        kv_cache_interface,
        "is_full_attention_spec",
        lambda spec: isinstance(spec, kv_cache_interface.FullAttentionSpec),
    )
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if is_full(group.kv_cache_spec):
            return index, group.kv_cache_spec.block_size
    raise CaptureError("capture needs a KV cache group with full attention, and this model has none")


def routers(model: Any) -> list[tuple[int, Any]]:
    """(decoder layer, router) of each MoE layer of a vLLM model; 0.24 to 0.33.

    Raises:
        CaptureError: a kernel that chooses experts inside, where no hook sees it, or no MoE layer at all.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    layer_routers = []
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        if not hasattr(module, "layer_id"):
            raise CaptureError(
                f"{name}: this vLLM does not say which decoder layer it is (0.22 and 0.23): capture by hooks, as with "
                "pipeline parallelism, needs 0.24 or later"
            )
        method = getattr(module, "_quant_method", None)
        if getattr(method, "is_monolithic", False) or not isinstance(module.router, BaseRouter):
            raise CaptureError(
                f"{name}: {type(module.router).__name__} with {type(method).__name__} chooses experts inside its "
                "kernel, where no hook sees them; choose another MoE backend"
            )
        layer_routers.append((int(module.layer_id), module.router))
    if not layer_routers:
        raise CaptureError(
            "the engine's model has no MoE layer, or one of its pipeline stages has none: there is nothing to capture"
        )
    return layer_routers


def make_stage_buffers(runner: Any) -> None:
    """Make the buffers for the output of the previous pipeline stage, on the CPU; 0.30 to 0.32.

    vLLM makes them in its warm-up run, skips that on the CPU in eager mode, and then fails an assertion.
    """
    from vllm.distributed import get_pp_group

    if runner.device.type == "cpu" and not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def rotary_kernel_fails() -> bool:
    """Whether the CPU kernel of rotary embeddings rotates wrong rows of heads `[T, H, D]`; 0.30.

    It uses the stride of the second-last dimension as that between tokens. Latent attention passes heads of this shape
    (vllm/model_executor/layers/mla.py), and its result then depends on a prompt's place in the batch.
    """
    from vllm import _custom_ops

    if not hasattr(torch.ops._C, "rotary_embedding"):
        return False
    heads = torch.arange(2 * 2 * 4, dtype=torch.float32).view(2, 2, 4)
    flat, key = heads.clone().flatten(1), torch.zeros(2, 4)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    for query in (heads, flat):
        _custom_ops.rotary_embedding(torch.arange(2), query, key.clone(), 4, table, False)
    return not torch.allclose(heads.flatten(1), flat)


def weight_versions(completion: Any) -> Any:
    """The weight versions of a completion, in vLLM's form; None up to 0.31."""
    return getattr(completion, "weight_versions", None)


def parallel_sizes(parallel_config: Any) -> dict[str, int]:
    """Sizes of the kinds of parallelism that some releases lack, by setting; 1 where a release lacks one."""
    names = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return {name: getattr(parallel_config, name, 1) for name in names}


def captures_natively(vllm_config: Any) -> bool:
    """Whether vLLM was asked to capture: a model setting until 0.30, `aux_output_config` from 0.31."""
    if getattr(vllm_config.model_config, "enable_return_routed_experts", False):
        return True
    aux = getattr(vllm_config, "aux_output_config", None)
    return bool(aux is not None and aux.enabled)


def decoder_layers(vllm_config: Any) -> int:
    """All decoder layers of the model, dense ones and other pipeline stages' included."""
    count = getattr(vllm_config.model_config, "get_total_num_hidden_layers", None)
    return count() if count is not None else vllm_config.model_config.hf_text_config.num_hidden_layers


@contextmanager
def routing_survives_merging() -> Iterator[None]:
    """Context that keeps routing when vLLM merges unread parts of a stream; until 0.30.

    Routing comes with a request's last part. 0.22 to 0.30 add that part to an unread earlier one, and leave its
    routing out: a busy server loses it now and then.
    """
    from vllm.outputs import RequestOutput

    add = RequestOutput.add

    def add_with_routing(self: Any, next_output: Any, aggregate: bool) -> None:
        routing = {part.index: part.routed_experts for part in next_output.outputs if part.routed_experts is not None}
        add(self, next_output, aggregate)
        for part in self.outputs:
            part.routed_experts = routing.get(part.index, part.routed_experts)

    RequestOutput.add = add_with_routing
    try:
        yield
    finally:
        RequestOutput.add = add
