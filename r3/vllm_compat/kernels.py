"""The kernels by which a batch-invariant vLLM engine computes on a Hopper GPU, called on a trainer's tensors.

They are those of vLLM 0.26 with VLLM_BATCH_INVARIANT=1: each row's result is the same in any batch. Nothing here has
gradients. Shapes: T tokens, H query heads, G key-value heads, D head dimension, I width, E experts, K slots, V
vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from r3.config.environment import set_variables, variables
from r3.errors import ConfigError

_VARIABLES = {
    "VLLM_BATCH_INVARIANT": "1",
    # cuBLAS reads these once, when it is first used. Without room for partial sums it cannot split a product along its
    # inner dimension, which it does for some numbers of rows.
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUBLASLT_WORKSPACE_SIZE": "1",
}
_LOGITS = 1 << 26  # float32 numbers of logits in memory at once: 256 MiB
SMALLEST_HEAD = 65
"""Of a head dimension. With up to 64, FlashAttention 3 takes blocks of 192 keys in decoding and of 128 in prefill."""


def prepare() -> None:
    """Have this process compute as a batch-invariant engine does. Before CUDA is used in it."""
    set_variables(_VARIABLES)
    torch.backends.cuda.preferred_blas_library(backend="cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_tf32 = False


def require_prepared() -> None:
    """
    Raises:
        ConfigError: this process, or its machine, does not compute as a batch-invariant engine does.
    """
    problem = None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        problem = "no NVIDIA GPU here"
    elif torch.cuda.get_device_capability()[0] != 9:
        problem = f"a GPU of compute capability {torch.cuda.get_device_capability()}, expected 9.0 (Hopper)"
    elif variables(list(_VARIABLES)) != _VARIABLES:
        problem = "r3.numerics.prepare() was not called before CUDA was used"
    else:
        try:
            _batch_invariant()
        except ImportError as error:
            problem = f"vLLM's kernels cannot be imported ({error})"
    if problem is not None:
        raise ConfigError(f"the engine's numerics: {problem}. Leave trainer.policy.numerics=own")


def _batch_invariant() -> Any:
    try:
        from vllm.model_executor.determinism import batch_invariant
    except ImportError:  # vLLM 0.26
        from vllm.model_executor.layers import batch_invariant
    return batch_invariant


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., O]` of `[..., I]` and `[O, I]`."""
    return _batch_invariant().linear_batch_invariant(x, weight, bias)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 `[..., O]` of `[..., I]` and `[O, I]` in any dtype: of gates that the engine keeps in float32.

    The engine computes it so too, by `r3.vllm_compat.invariant_worker`.
    """
    from r3.vllm_compat.float32_product import float32_product

    return float32_product(x.float(), weight.float())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded once, at its end. Sums with a residual are made before: `r3.vllm_compat.invariant_worker`."""
    return _batch_invariant().rms_norm_batch_invariant(x, weight, eps)


def rotation(head_size: int, positions: int, parameters: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Cosines and sines `[positions, R]` of R rotated dimensions, computed on this GPU as the engine does."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()), torch.device("cuda"):
        return get_rope(head_size, positions, rope_parameters=parameters, dtype=dtype).cos_sin_cache


def rotate(query: Tensor, key: Tensor, positions: Tensor, cache: Tensor) -> None:
    """Turn contiguous `[T, H, D]` and `[T, G, D]` in place, to int64 `[T]` positions: in float32, rounded once."""
    from vllm import _custom_ops

    flat = (tensor.view(len(tensor), -1) for tensor in (query, key))
    _custom_ops.rotary_embedding(positions, *flat, query.shape[-1], cache, True)


def attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Causal attention `[T, H, D]` of sequences that lie end to end.

    Args:
        query: `[T, H, D]`.
        key, value: `[T, G, D]`.
        bounds: int32 `[N + 1]`, where each of N sequences begins, and T.
        longest: tokens of the longest.
        scale: of the scores.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    output = torch.empty_like(query)
    flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=output,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        fa_version=3,
        num_splits=1,
    )
    return output


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`[T, I]` of `[T, 2 I]`."""
    output = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    torch.ops._C.silu_and_mul(output, gate_up)
    return output


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`[..., I]` of `[..., I]`, weights `[J, I]`, `[J, I]` and `[I, J]`: of dense layers and of shared experts."""
    return linear(silu_and_mul(torch.cat((linear(x, gate), linear(x, up)), -1)), down)


def softmax_weights(logits: Tensor, ids: Tensor, *, renormalize: bool) -> Tensor:
    """Float32 `[T, K]`, weights of the experts `ids` `[T, K]` by the softmax of `[T, E]`, in the order of the ids."""
    from vllm import _custom_ops

    count, number = logits.shape
    weights = torch.empty(count, number, dtype=torch.float32, device=logits.device)
    order = torch.empty(count, number, dtype=torch.int32, device=logits.device)
    # Sorted over all experts, of which those that were recorded are taken: a top-k would choose anew.
    _custom_ops.topk_softmax(weights, order, torch.empty_like(order), logits.contiguous(), False)
    scores = torch.empty_like(weights).scatter_(1, order.long(), weights).gather(1, ids.long())
    if not renormalize:
        return scores
    total = torch.zeros(count, device=logits.device)
    for slot in range(ids.shape[1]):  # one after the other, and a product with the reciprocal, as the kernel does
        total = total + scores[:, slot]
    return scores * (1 / total)[:, None]


def sigmoid_weights(logits: Tensor, ids: Tensor) -> Tensor:
    """Float32 `[T, K]`, weights of the experts `ids` `[T, K]` by the sigmoids of float32 `[T, E]`, which sum to 1."""
    from vllm import _custom_ops

    # The kernel chooses by sigmoid and bias, and weighs by sigmoid alone. So the recorded experts are shown to it in
    # the first columns, with biases by which it chooses them in their order: it sums over the slots, as a tree.
    slots = ids.shape[1]
    shown = torch.zeros_like(logits)
    shown[:, :slots] = logits.gather(1, ids.long())
    bias = logits.new_zeros(logits.shape[1])
    bias[:slots] = 2 * torch.arange(slots, 0, -1, device=logits.device)
    return _custom_ops.grouped_topk(shown, 1, 1, slots, True, 1.0, bias, 1)[0]


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """`[T, I]` of hidden states `[T, I]`, fused `[E, 2 J, I]` and `[E, I, J]`, float32 weights `[T, K]` and ids."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts(hidden.contiguous(), gate_up, down, weights, ids.int())


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Float32 `[T]`, processed log-probabilities in nats of int64 labels `[T]`: 0 where a label is negative.

    Args:
        hidden: bfloat16 `[T, I]`.
        weight: bfloat16 `[V, I]`.
    """
    found, log_softmax = [], _batch_invariant().log_softmax
    size = max(1, _LOGITS // len(weight))
    for states, ids in zip(hidden.split(size), labels.split(size), strict=True):
        logits = torch.mm(states, weight.t(), out_dtype=torch.float32).div_(temperature)
        found.append(log_softmax(logits).gather(1, ids.clamp(min=0)[:, None])[:, 0].masked_fill_(ids < 0, 0))
    return torch.cat(found)
