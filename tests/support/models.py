"""Tiny models that the tests build, and data for them."""

import torch
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOP_K, VOCAB = 3, 8, 2, 64


def tiny_moe(dtype: torch.dtype = torch.float32, **changes) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights, the same at every call."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | changes)).to(dtype).eval()


def tiny_dense() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def tokens(batch: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_ids(batch: int = 2, length: int = 10, layers: int = LAYERS, seed: int = 0) -> torch.Tensor:
    """int64 `[B, S, L, K]`, distinct within a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, layers, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]


class Choices(TorchFunctionMode):
    """A plain model's routers, in their order, made to choose `ids` `[T, L, K]` where these are not negative."""

    def __init__(self, case, ids):
        super().__init__()
        self.case, self.ids, self.chosen = case, ids, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0].flatten(0, -2)
        if scores.shape != (len(self.ids), self.case.num_experts) or result.indices.shape[-1] != self.case.top_k:
            return result
        ids = self.ids[:, len(self.chosen)]
        indices = torch.where(ids < 0, result.indices.flatten(0, -2), ids)
        self.chosen.append(indices)
        shape = result.indices.shape
        return torch.return_types.topk((scores.gather(-1, indices).view(shape), indices.view(shape)))
