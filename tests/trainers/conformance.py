"""What holds for every trainer: the log-probabilities of its loss are those of a plain replayed forward.

The oracle knows nothing of the trainer. It has the engine's own rows by the tokens of each sequence, and runs each
sequence alone, unpadded, through a plain Hugging Face model that r3 is attached to.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import r3

EQUAL = 1e-5
"""Largest `distance` between a padded, packed or cut forward in float32 and that of one sequence alone."""


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest distance of log-probabilities in nats; as a part of those below -1, which float32 rounds by more."""
    return ((got - wanted).abs() / wanted.abs().clamp(min=1)).max().item()


class Oracle:
    """Log-probabilities of whole sequences by a plain model.

    Args:
        model: any model of the weights wanted; it is copied.
        rows: integer `[T, L, K]` for the first T tokens of each sequence of token ids, as an engine gave them.
    """

    def __init__(self, model: nn.Module, rows: Mapping[tuple[int, ...], Tensor]) -> None:
        self.model = copy.deepcopy(model).float().eval()
        self.replay = r3.attach(self.model)
        self.rows = rows

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int], *, replayed: bool, temperature: float = 1.0) -> Tensor:
        """float32 `[len(ids) - 1]` in nats, of each token after the first."""
        tokens = torch.tensor([list(ids)])
        routing = {}
        if replayed:
            rows = self.rows[tuple(ids)].to(torch.int32)
            whole = torch.full((1, len(ids), *rows.shape[1:]), -1, dtype=torch.int32)
            whole[0, : len(rows)] = rows
            routing = {"routed_experts": whole}
        logits = self.model(input_ids=tokens, use_cache=False, **routing).logits[0, :-1] / temperature
        return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]


def plain_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model without its wrappers; sharded ones gathered, LoRA added where it is active."""
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()
    if hasattr(model, "peft_config"):
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_A") and not layer.disable_adapters:
                added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                state[f"{path}.base_layer.weight"] += layer.scaling["default"] * added.detach()
        state = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in state.items()
            if "lora_" not in name
        }
    return state
