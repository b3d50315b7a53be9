"""A worker extension for batch-invariant engines, that takes away what is not invariant in vLLM 0.26.

Norms: that of a sum with a residual is one CUDA kernel there. It sums a row with up to 1,024 threads in batches of
fewer than 256 rows and with 256 in others, so with a hidden size over 256 a row's result depends on its batch, also
with VLLM_BATCH_INVARIANT=1 (vllm-project/vllm#48271). Here the sum and the norm are two kernels, and the norm is the
one that vLLM takes where there is no residual: it sums in one order always.

Gates: that of glm4_moe is a product in float32, which vLLM leaves to cuBLAS, whose kernel depends on the rows. Here it
is `r3.vllm_compat.float32_product`.
"""

from functools import wraps
from typing import Any

from torch import Tensor
from vllm.model_executor.layers import layernorm
from vllm.model_executor.models.glm4_moe import Glm4MoE

from r3.errors import ConfigError

if not hasattr(layernorm, "rms_norm_batch_invariant"):
    raise ConfigError(
        "trainer.policy.numerics=matched: expected vLLM's RMSNorm to call rms_norm_batch_invariant, got a vLLM that "
        "does not: its norms cannot be made batch-invariant. Leave trainer.policy.numerics=own"
    )
_norm, _made = layernorm.rms_norm_batch_invariant, Glm4MoE.__init__


def added_norm(
    input: Tensor, weight: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """In place of `rms_norm_batch_invariant`: the norm of `input`, or of its sum with `residual`, and that sum."""
    if residual is None:
        return _norm(input, weight, eps)
    total = input + residual
    return _norm(total, weight, eps), total


@wraps(_made)
def with_gate(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of a MoE layer's `__init__`: its gate multiplies in one order."""
    from r3.vllm_compat.float32_product import float32_product

    _made(self, *args, **kwargs)
    gate = self.gate
    gate.forward = lambda x: float32_product(x, gate.weight)


class InvariantWorker:
    """For `LLM(worker_extension_cls=...)`: workers import it before they make a model."""


layernorm.rms_norm_batch_invariant = added_norm
Glm4MoE.__init__ = with_gate
