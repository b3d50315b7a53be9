"""vLLM's own model classes, built on the CPU without an engine: what they declare, and what their loaders take.

To be used in a process of its own (`ranks.Ranks(1)`): vLLM wants a process group and sets what is global.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Families of tests/support/zoo that vLLM 0.30 builds on the CPU -> what their configuration must say besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {},
    "mixtral": {},
    "glm4_moe": dict(head_dim=16),
    "ernie4_5_moe": {},
    "granitemoe": {},
    "deepseek_v2": {},
    "deepseek_v3": dict(topk_method="noaux_tc"),
}


@functools.cache
def config_of(folder: str) -> Any:
    """vLLM's configuration for the checkpoint in `folder`."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64, block_size=16
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    return config


def vllm_model(config: Any) -> tuple[nn.Module, Callable]:
    """A new model whose memory is all NaN, and its `load_weights`. Nothing is processed after loading."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = copy.copy(config)
    config.compilation_config = copy.deepcopy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    # Its CPU build declares FP8 layers only where there is AMX, which only running them needs.
    amx = mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True)
    with amx, set_current_vllm_config(config), _default_dtype(torch.bfloat16):
        model = initialize_model(vllm_config=config)
    for tensor in declared(model).values():
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.data.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point():
            tensor.data.fill_(torch.nan)

    def load(named: list[tuple[str, Tensor]]) -> None:
        with set_current_vllm_config(config):
            model.load_weights(iter(named))

    return model, load


def declared(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, without those for the scales of the KV cache, which are removed once weights are loaded."""
    return {name: p for name, p in model.named_parameters() if ".attn." not in name}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
