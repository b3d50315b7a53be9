"""Stand-ins for the engine's kernels on a CPU: the same functions in PyTorch, rounded where vLLM's GPU kernels round.

`by_layers` is a decoder of Qwen3 or GLM-4-MoE written from them as vLLM writes it: what a matched model must equal bit
for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32, rounded once before the bias: not what PyTorch's bfloat16 product gives on every CPU."""
    product = F.linear(x.float(), weight.float()).to(x.dtype)
    return product if bias is None else product + bias


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Summed in float64: a CPU's float32 product gives a row other bits in another batch."""
    return F.linear(x.double(), weight.double()).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt().reciprocal() * weight.float()).to(x.dtype)


def rotation(head_size: int, positions: int, parameters: dict, dtype: torch.dtype) -> Tensor:
    rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    inverse = 1 / parameters["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
    angles = torch.outer(torch.arange(positions).float(), inverse)
    return torch.cat((angles.cos(), angles.sin()), -1).to(dtype)


def rotate(query: Tensor, key: Tensor, positions: Tensor, cache: Tensor) -> None:
    cos, sin = cache[positions].float()[:, None].chunk(2, -1)
    for heads in (query[..., : cache.shape[1]], key[..., : cache.shape[1]]):
        first, second = heads.float().chunk(2, -1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    output = torch.empty_like(query)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - begin <= longest
        parts = [t[begin:end].transpose(0, 1).float()[None] for t in (query, key, value)]
        found = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
        output[begin:end] = found[0].transpose(0, 1).to(query.dtype)
    return output


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def softmax_weights(logits: Tensor, ids: Tensor, *, renormalize: bool) -> Tensor:
    weights = logits.float().softmax(-1).gather(1, ids.long())
    return weights * weights.sum(-1, keepdim=True).reciprocal() if renormalize else weights


def sigmoid_weights(logits: Tensor, ids: Tensor) -> Tensor:
    scores = (0.5 * torch.tanh(0.5 * logits) + 0.5).gather(1, ids.long())
    total = F.pad(scores, (0, 32 - scores.shape[1]))  # the lanes of a warp
    while total.shape[1] > 1:
        total = sum(total.chunk(2, 1))
    return scores / total


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    rows = []
    for state, chosen, share in zip(hidden, ids.long(), weights, strict=True):
        inner = silu_and_mul(torch.stack([linear(state, gate_up[e]) for e in chosen]))
        parts = torch.stack([F.linear(i.float(), down[e].float()) for i, e in zip(inner, chosen, strict=True)])
        rows.append((parts * share[:, None]).to(hidden.dtype).float().sum(0).to(hidden.dtype))
    return torch.stack(rows)


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden.float(), weight.float()) / temperature
    return logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0)


@torch.no_grad()
def by_layers(model, ids: Tensor, routing: Tensor | None) -> Tensor:
    """The last hidden states `[T, H]` of one sequence `[T]`, with the experts `[T, L, K]`."""
    config, decoder = model.config, model.model
    width, cache = config.head_dim, rotation(config.head_dim, 64, config.rope_parameters, torch.bfloat16)
    residual = decoder.embed_tokens.weight[ids]
    update = None
    for index, layer in enumerate(decoder.layers):
        attended, norm = layer.self_attn, layer.input_layernorm
        residual = residual if update is None else residual + update
        states = rms_norm(residual, norm.weight, norm.variance_epsilon)
        heads = [
            linear(states, part.weight, part.bias).view(len(ids), -1, width)
            for part in (attended.q_proj, attended.k_proj, attended.v_proj)
        ]
        query, key = heads[:2]
        if getattr(config, "use_qk_norm", True):
            query = rms_norm(query, attended.q_norm.weight, attended.q_norm.variance_epsilon)
            key = rms_norm(key, attended.k_norm.weight, attended.k_norm.variance_epsilon)
        rotate(query, key, torch.arange(len(ids)), cache)
        bounds = torch.tensor([0, len(ids)])
        mixed = attention(query, key, heads[2], bounds, len(ids), width**-0.5).flatten(1)
        residual = residual + linear(mixed, attended.o_proj.weight)
        norm = layer.post_attention_layernorm
        states = rms_norm(residual, norm.weight, norm.variance_epsilon)
        mlp = layer.mlp
        if not hasattr(mlp, "experts"):
            update = _mlp(states, mlp)
            continue
        chosen = routing[:, index]
        if config.model_type == "glm4_moe":
            weights = sigmoid_weights(float32_linear(states, mlp.gate.weight), chosen)
            routed = experts(states, mlp.experts.gate_up_proj, mlp.experts.down_proj, weights, chosen)
            update = _mlp(states, mlp.shared_experts) + routed * config.routed_scaling_factor
            continue
        weights = softmax_weights(linear(states, mlp.gate.weight), chosen, renormalize=config.norm_topk_prob)
        update = experts(states, mlp.experts.gate_up_proj, mlp.experts.down_proj, weights, chosen)
    return rms_norm(residual + update, decoder.norm.weight, decoder.norm.variance_epsilon)


def _mlp(states: Tensor, mlp) -> Tensor:
    gate_up = torch.cat((linear(states, mlp.gate_proj.weight), linear(states, mlp.up_proj.weight)), -1)
    return linear(silu_and_mul(gate_up), mlp.down_proj.weight)
