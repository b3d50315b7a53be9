"""Checks that every synced weight changes the engine's outputs as it changes the trainer's.

A sync compares what was sent with what was received. It cannot see which tensors the engine computes with: if a layer
keeps a copy of a weight, the copy stays stale without an error. So this changes and syncs one kind of weight at a time,
and scores the engine's samples by the trainer's model with and without the change.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r3.capture import collect
from r3.capture.ask import ask
from r3.doctor.engine_agreement import SAMPLED_TOKENS, probe_prompts, score
from r3.errors import SyncError, summary
from r3.replay import Replay
from r3.weight_sync import WeightSync, named_weights

CHANGE = 0.5
"""How much a weight is changed, as a share of its own spread."""
_CLEAR = 4.0  # the better of two explanations is this much closer
# Scales of the measures: smaller differences are rounding.
_MEASURES = {"logprob_diff/replayed/k3": 1e-4, "logprob_diff/live/k3": 1e-4, "routing/differing_rows": 1e-2}


@dataclass(frozen=True, kw_only=True)
class KindArrival:
    """One kind of weight: those whose names differ by numbers only.

    Attributes:
        kind: the name, with `*` for numbers.
        weights: how many there are.
        arrived: whether the engine follows the change. None if the change is too small to be distinguished from
            rounding.
        with_change, without: k3 of the engine's samples, nats a token, with routing replayed, scored by the trainer's
            model with and without the change.
    """

    kind: str
    weights: int
    arrived: bool | None
    with_change: float
    without: float


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """All kinds of weights of a model.

    Attributes:
        kinds: one for each kind of weight, in the order of the model.
        version: version of the unchanged weights, which the engine has again.
    """

    kinds: tuple[KindArrival, ...]
    version: int

    @property
    def stale(self) -> tuple[str, ...]:
        """Kinds that do not arrive."""
        return tuple(kind.kind for kind in self.kinds if kind.arrived is False)

    @property
    def untold(self) -> tuple[str, ...]:
        """Kinds for which the check is inconclusive."""
        return tuple(kind.kind for kind in self.kinds if kind.arrived is None)

    def require(self) -> None:
        """Raise `SyncError` if a kind of weight does not arrive."""
        if self.stale:
            lines = [
                f"{kind.kind}: k3 {kind.with_change:.2g} with the change, {kind.without:.2g} without it"
                for kind in self.kinds
                if kind.arrived is False
            ]
            raise SyncError(
                f"{len(lines)} kinds of weights do not change what the engine computes, though their syncs committed: "
                "it computes with copies that it does not renew. Such a model can only be served by an engine that is "
                f"started anew for each version:{summary(lines)}"
            )


def arrival(
    sync: WeightSync,
    engine: Any,
    replay: Replay,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = SAMPLED_TOKENS,
    change: float = CHANGE,
    progress: Callable[[str], None] = lambda text: None,
) -> Arrival:
    """Change, sync and compare each kind of weight alone; then sync the weights as they were.

    Takes a sync, an answer to a few prompts and four forwards for each kind. A model has twenty to forty kinds.

    Args:
        sync: weight sync into the engine. Its first push here is of the unchanged weights.
        engine: a `vllm.LLM`, or the URL of a server.
        replay: what `attach` returned for the trainer's model, which is unsharded. Its weights are changed in place and
            restored bit for bit.
        prompts: token ids; by default random ones.
        max_tokens: tokens to sample for each prompt.
        change: size of the change, as a share of the weight's own spread.
        progress: called with the name of each kind before it is checked.

    Raises:
        SyncError: a sync that does not commit.
        CaptureError: no answer, or one that cannot be used.
    """
    model = replay.model
    prompts = prompts or probe_prompts(model)
    fields = {"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True}
    version = sync.version or 0

    def push() -> None:
        nonlocal version
        version += 1
        sync.push(named_weights(model), version=version)

    push()
    kinds: list[KindArrival] = []
    try:
        for kind, weights in _kinds(model).items():
            progress(kind)
            with _changed(weights, change):
                push()
                rollouts = collect(ask(engine, [(prompt, fields) for prompt in prompts]).responses, replay.spec)
                after = score(model, rollouts)
            kinds.append(_judge(kind, len(weights), after, score(model, rollouts)))
    finally:
        push()
    return Arrival(kinds=tuple(kinds), version=version)


def _kinds(model: nn.Module) -> dict[str, list[Tensor]]:
    """The floating-point weights of a checkpoint, by name with `*` for numbers; each tensor once."""
    persistent = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in persistent and tensor.is_floating_point():
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(tensor)
    return kinds


@contextmanager
def _changed(weights: list[Tensor], change: float) -> Iterator[None]:
    """Context in which noise is added to `weights`."""
    before = [tensor.detach().clone() for tensor in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in weights:
            spread = tensor.float().std() if tensor.numel() > 1 else torch.zeros(())
            # Constant weights (norms, biases at initialisation) have no spread of their own.
            size = torch.maximum(spread, 0.5 * tensor.float().abs().mean()).clamp_min(1e-2).to(tensor.device)
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor.add_((change * size * noise).to(tensor.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(weights, before, strict=True):
                tensor.copy_(old)


def _judge(kind: str, weights: int, after: dict[str, float], before: dict[str, float]) -> KindArrival:
    """Judge by the measure that separates the change and its absence most clearly."""
    apart = {name: (after[name] + least) / (before[name] + least) for name, least in _MEASURES.items() if name in after}
    clearest = max(apart.values(), key=lambda ratio: max(ratio, 1 / ratio))
    arrived = None if 1 / _CLEAR < clearest < _CLEAR else clearest < 1
    k3 = "logprob_diff/replayed/k3" if "logprob_diff/replayed/k3" in after else "logprob_diff/live/k3"
    return KindArrival(kind=kind, weights=weights, arrived=arrived, with_change=after[k3], without=before[k3])
