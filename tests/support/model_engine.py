"""A stand-in for `vllm.LLM` that samples from a model of transformers, to be given the faults of an engine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import r3


class ModelEngine:
    """Answers `generate` with tokens, log-probabilities and routing of `model`; prompts are of one length.

    Args:
        disturb: of the logits `[B, V]` of a step, what a fault makes of them.
    """

    def __init__(self, model: nn.Module, disturb: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        self.model = model
        # For good: each recorder proves the routers anew.
        self.recorder = r3.record(model).__enter__()
        self.disturb = disturb
        self.generator = torch.Generator().manual_seed(0)
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(model="stand-in"))

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling: list[Any], use_tqdm: bool) -> list[Any]:
        assert len({each.temperature for each in sampling}) == 1
        ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts])
        length, logprobs = ids.shape[1], []
        for _ in range(sampling[0].max_tokens):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1].float()
            found = self.disturb(logits).log_softmax(-1)
            hot = sampling[0].temperature > 0
            token = torch.multinomial(found.exp(), 1, generator=self.generator) if hot else found.argmax(-1)[:, None]
            logprobs.append(found.gather(-1, token))
            ids = torch.cat([ids, token], 1)
        rows = self._rows(self.recorder.routing)
        return [
            SimpleNamespace(
                prompt_token_ids=row[:length],
                outputs=[
                    SimpleNamespace(
                        token_ids=row[length:],
                        logprobs=[{t: SimpleNamespace(logprob=p)} for t, p in zip(row[length:], values, strict=True)],
                        routed_experts=rows[b],
                        finish_reason="length",
                    )
                ],
            )
            for b, (row, values) in enumerate(zip(ids.tolist(), torch.cat(logprobs, 1).tolist(), strict=True))
        ]

    def _rows(self, routing: r3.RolloutRouting) -> Any:
        """By decoder layer, with zeros for those without a router, as vLLM sends them."""
        spec = self.recorder._spec
        rows = torch.zeros(*routing.shape[:2], spec.num_layers, spec.top_k, dtype=torch.uint8)
        rows[:, :, list(routing.layer_ids)] = routing.expert_ids
        return rows.numpy()
