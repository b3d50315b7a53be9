"""A worker extension for batch-invariant engines, that takes away what is not invariant in vLLM 0.26.

There the norm of a sum with a residual is one CUDA kernel. It sums a row with up to 1,024 threads in batches of fewer
than 256 rows and with 256 in others, so with a hidden size over 256 a row's result depends on its batch, also with
VLLM_BATCH_INVARIANT=1 (vllm-project/vllm#48271). In an engine that loads this module the sum and the norm are two
kernels, and the norm is the one that vLLM takes where there is no residual: it sums in one order always.
"""

from torch import Tensor
from vllm.model_executor.layers import layernorm
from vllm.model_executor.layers.batch_invariant import rms_norm_batch_invariant

from r3.errors import ConfigError


def added_norm(
    input: Tensor, weight: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """In place of `rms_norm_batch_invariant`: the norm of `input`, or of its sum with `residual`, and that sum."""
    if residual is None:
        return rms_norm_batch_invariant(input, weight, eps)
    total = input + residual
    return rms_norm_batch_invariant(total, weight, eps), total


class InvariantNorms:
    """For `LLM(worker_extension_cls=...)`: workers import it before they load a model."""


if not hasattr(layernorm, "rms_norm_batch_invariant"):
    raise ConfigError(
        "trainer.policy.numerics=matched: expected vLLM's RMSNorm to call rms_norm_batch_invariant, got a vLLM that does "
        "not: its norms cannot be made batch-invariant. Leave trainer.policy.numerics=own"
    )
layernorm.rms_norm_batch_invariant = added_norm
