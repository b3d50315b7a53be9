"""What every adapter to a trainer shows: its tests run the real trainer, and hand what they saw to the checks below.

The oracle knows nothing of the trainer. It has the engine's own rows by the tokens of each sequence, and runs each
sequence alone, unpadded, through a plain Hugging Face model that r3 is attached to. Where no engine runs, rows are a
function of their token (`rows_of`): one that is put beside another token changes its log-probability.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DEMO_MODEL
from torch import Tensor, nn

import r3
from r3.capture import Rollout, SamplingMask, load_rollouts

EQUAL = 1e-5
"""Largest `distance` between a padded, packed or cut forward in float32 and that of one sequence alone."""

APART = 100 * EQUAL
"""`distance` of live forwards from replayed ones that shows which they are. An engine may agree by itself in some."""

LAYERS, EXPERTS, SLOTS, VOCABULARY = 8, 32, 4, 384  # of the demo's model


@dataclass
class Scored:
    """A forward of the trainer's beside plain ones of the same sequences.

    Attributes:
        replayed: largest `distance` from the plain replayed forwards; NaN where the engine's rows are not known.
        live: largest `distance` from the plain live forwards.
        sequences: how many were compared.
        in_loss: whether the trainer's loss is made of it.
        training: whether the policy is in training, not in evaluation.
        reference: whether it is the reference's.
        sampled: of each sequence that an engine sampled, float32 `[G]` of its completion in nats: by the trainer, by a
            plain live forward, and by the engine.
    """

    replayed: float = 0.0
    live: float = 0.0
    sequences: int = 0
    in_loss: bool = True
    training: bool = True
    reference: bool = False
    sampled: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)


def check_replayed(forwards: Iterable[Scored], equal: float = EQUAL) -> None:
    """Aligned and exact: each forward of the policy in training is that of its own tokens' rows.

    Those of the loss must be there, and live ones would be seen: among those of the loss and among the others.
    """
    policy = [each for each in forwards if each.training and not each.reference and each.sequences]
    assert any(each.in_loss for each in policy)
    assert all(each.replayed < equal for each in policy), policy
    for in_loss in {each.in_loss for each in policy}:
        assert max(each.live for each in policy if each.in_loss == in_loss) > max(APART, 10 * equal), policy


def check_live(forwards: Iterable[Scored], equal: float = EQUAL) -> None:
    """A reference or an evaluation: nothing is replayed."""
    forwards = [each for each in forwards if each.sequences]
    assert forwards
    assert all(each.live < equal for each in forwards), forwards
    assert not all(each.replayed < equal for each in forwards), forwards  # or nothing would show


def check_gap(own: float, live: float) -> None:
    """The trainer's own measure of the mismatch is at most a third of what it is live, on the same rollouts."""
    assert 0 < own < live / 3, (own, live)


def check_identical(off: Any, without: Any) -> None:
    """With replay off the trainer is the one without r3, bit for bit. Both: what a run gave, of tensors and numbers."""
    if isinstance(off, Mapping):
        assert off.keys() == without.keys()
        check_identical(list(off.values()), [without[name] for name in off])
    elif isinstance(off, list | tuple):
        assert len(off) == len(without)
        for mine, other in zip(off, without, strict=True):
            check_identical(mine, other)
    elif isinstance(off, Tensor):
        assert torch.equal(off, without)
    else:
        assert off == without


@contextlib.contextmanager
def check_refused(setting: str, cure: str) -> Iterator[None]:
    """What runs inside stops with an error that names `setting` and then `cure`, both regular expressions."""
    with pytest.raises(r3.ConfigError, match=rf"(?s){setting}.*{cure}"):
        yield


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest distance of log-probabilities in nats; as a part of those below -1, which float32 rounds by more."""
    assert got.shape == wanted.shape
    apart = (got - wanted).abs() / wanted.abs().clamp(min=1)
    return apart.nan_to_num(nan=math.inf).max().item()  # `max` of Python passes over NaN


def furthest(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest `distance` of several sequences'."""
    return max(distance(mine, other) for mine, other in zip(got, wanted, strict=True))


@cache
def _table() -> Tensor:
    scores = torch.rand(VOCABULARY, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2))
    return scores.topk(SLOTS, -1).indices.to(torch.uint8)


def rows_of(ids: Sequence[int] | Tensor) -> Tensor:
    """uint8 `[T, L, K]`: experts of the demo's model that are a function of the token alone."""
    return _table()[torch.as_tensor(ids).cpu()]


class Oracle:
    """Log-probabilities of whole sequences by a plain model.

    Args:
        model: any model of the weights wanted; it is copied.
        rows: integer `[T, L, K]` for the first T tokens of each sequence of token ids, as an engine gave them.
        sets: of sequences whose tokens were sampled from less than the vocabulary, over which they are then scored.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Mapping[tuple[int, ...], Tensor],
        sets: Mapping[tuple[int, ...], SamplingMask] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).float().eval()
        self.replay = r3.attach(self.model)
        self.rows = rows
        self.sets = sets or {}

    def logprobs(self, ids: Sequence[int] | Tensor, *, replayed: bool, temperature: float = 1.0) -> Tensor:
        """float32 `[len(ids) - 1]` in nats, of each token after the first."""
        scores = self.distributions(ids, replayed=replayed, temperature=temperature)
        return scores.gather(-1, torch.as_tensor(ids, device=scores.device)[1:, None])[:, 0]

    def distributions(self, ids: Sequence[int] | Tensor, *, replayed: bool, temperature: float = 1.0) -> Tensor:
        """`[len(ids) - 1, V]` in nats, from which each token after the first was sampled; -inf for what was cut."""
        known = tuple(torch.as_tensor(ids).tolist())
        tokens = torch.tensor([known], device=self.model.device)
        routing = {}
        if replayed:
            rows = self.rows[known].to(tokens.device, torch.int32)
            whole = rows.new_full((1, len(known), *rows.shape[1:]), -1)
            whole[0, : len(rows)] = rows
            routing = {"routed_experts": whole}
        logits = self.model(input_ids=tokens, use_cache=False, **routing).logits[0, :-1] / temperature
        if known in self.sets:
            logits = logits.masked_fill(_cut(self.sets[known], logits.shape[-1])[1:].to(logits.device), -math.inf)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def scored(
        self,
        forward: Iterable[tuple[Sequence[int] | Tensor, Tensor]],
        sampled: Mapping[tuple[int, ...], Tensor] | None = None,
        temperature: float = 1.0,
        **kind: bool,
    ) -> Scored:
        """Beside a forward of the trainer's.

        Args:
            forward: token ids of each of its sequences, and the trainer's log-probabilities of the last n of them.
            sampled: the engine's, of the sequences that it sampled: as long as their completion.
            temperature: by which logits are divided.
            kind: `in_loss`, `training` and `reference` of the result.
        """
        made = Scored(**kind)
        for ids, got in forward:
            made.sequences += 1
            known, got = tuple(torch.as_tensor(ids).tolist()), got.detach().float().cpu()
            live = self.logprobs(known, replayed=False, temperature=temperature).cpu()[-len(got) :]
            made.live = max(made.live, distance(got, live))
            if known not in self.rows:
                made.replayed = float("nan")
                continue
            wanted = self.logprobs(known, replayed=True, temperature=temperature).cpu()[-len(got) :]
            made.replayed = max(made.replayed, distance(got, wanted))
            if sampled is not None and known in sampled:
                made.sampled.append((got, live, sampled[known]))
        return made


def _cut(mask: SamplingMask, vocabulary: int) -> Tensor:
    """bool `[S, V]`: True where an id was not left to sample from."""
    cut = torch.zeros(len(mask.sizes), vocabulary, dtype=torch.bool)
    for row, ids in zip(cut, mask.token_ids.long().split(mask.sizes.tolist()), strict=True):
        if len(ids):
            row[:] = True
            row[ids] = False
    return cut


def plain_model(weights: Mapping[str, Tensor] | None = None) -> Any:
    """The demo's model in float32, with other weights if they are given."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    if weights is not None:
        made.load_state_dict(weights)
    return made


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


def sampled_rollouts() -> list[Rollout]:
    """What vLLM sampled from the demo's model, for trainers that have no engine on a CPU: all of one length."""
    return load_rollouts(Path(__file__).with_name("rollouts.safetensors")).items


def rollouts_oracle(rollouts: Sequence[Rollout]) -> Oracle:
    """The demo's model, which has the rows of these."""
    return Oracle(plain_model(), {(*each.prompt_ids, *each.token_ids): captured_rows(each) for each in rollouts})


def captured_rows(rollout: Rollout) -> Tensor:
    """uint8 `[T, L, K]` of all tokens but the last."""
    return rollout.routing.expert_ids[0, :-1]
