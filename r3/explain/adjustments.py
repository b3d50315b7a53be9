"""Adjustments of the logits before the temperature, as vLLM makes them: penalties, a bias, a list of allowed tokens.

n tokens, V tokens of vocabulary, B rollouts, S their longest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Before:
    """The tokens before each scored one.

    Attributes:
        input_ids: int64 `[B, S]`.
        row: int64 `[n]`, index of the rollout.
        begin: int64 `[n]`, position of the first token that the same request sampled.
        end: int64 `[n]`, position of the token itself.
    """

    input_ids: Tensor
    row: Tensor
    begin: Tensor
    end: Tensor

    def part(self, tokens: slice) -> "Before":
        """The same for a slice of the scored tokens."""
        return Before(input_ids=self.input_ids, row=self.row[tokens], begin=self.begin[tokens], end=self.end[tokens])

    def counts(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Float `[n, V]`, twice: how often the request sampled each token, and how often it occurs before at all."""
        ids = self.input_ids[self.row]
        position = torch.arange(ids.shape[1], device=ids.device)
        before = position < self.end[:, None]
        nothing = torch.zeros(len(ids), vocabulary, device=ids.device)
        sampled = nothing.scatter_add(1, ids, (before & (position >= self.begin[:, None])).float())
        return sampled, nothing.scatter_add(1, ids, before.float())

    def compact(self, logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, sampled, seen) as in `counts`, in few columns, since penalties change only tokens that were seen.

        Column 0 is the label's, column 1 has the mass at `temperature` of all tokens that were not seen, and the others
        are the seen tokens, each once.
        """
        sampled, seen = self.counts(logits.shape[1])
        own, ids = labels[:, None], self.input_ids[self.row]
        # With a stable sort, the first of equal ids is its first occurrence.
        ordered, order = self.input_ids.sort(dim=1, stable=True)
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        first = ~torch.zeros_like(again).scatter(1, order, again)[self.row]
        kept = first & (torch.arange(ids.shape[1], device=ids.device) < self.end[:, None]) & (ids != own)
        unseen = logits.masked_fill((seen > 0).scatter(1, own, True), -math.inf)
        mass = temperature * (unseen / temperature).logsumexp(1, keepdim=True)
        columns = torch.cat([own, own, ids], dim=1)
        gathered = [part.gather(1, columns) for part in (logits, sampled, seen)]
        gathered[0][:, 1:2], gathered[1][:, 1], gathered[2][:, 1] = mass, 0, 0
        gathered[0][:, 2:].masked_fill_(~kept, -math.inf)
        return gathered[0], gathered[1], gathered[2]


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """An adjustment of the logits by the `SamplingParams` of the same names."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        words = [f"{name.replace('_', ' ')} {value:.2f}" for name, value, none in self._penalties() if value != none]
        if self.logit_bias:
            words.append(f"a logit bias on {len(self.logit_bias)} tokens")
        if self.allowed_token_ids:
            words.append(f"{len(self.allowed_token_ids)} allowed tokens")
        return ", ".join(words)

    def __bool__(self) -> bool:
        return bool(str(self))

    @property
    def of_seen(self) -> bool:
        """Whether it changes only tokens that were seen."""
        return not self.logit_bias and not self.allowed_token_ids

    def _penalties(self) -> Sequence[tuple[str, float, float]]:
        return (
            ("presence_penalty", self.presence_penalty, 0.0),
            ("frequency_penalty", self.frequency_penalty, 0.0),
            ("repetition_penalty", self.repetition_penalty, 1.0),
        )

    def applied(self, logits: Tensor, labels: Tensor, sampled: Tensor, seen: Tensor) -> Tensor:
        """The adjusted logits, `[n, V]`. A label that is not allowed keeps its logit, since it was sampled.

        Args:
            logits: float32 `[n, V]`.
            labels: int64 `[n]`.
            sampled, seen: as `Before.counts` gives them.
        """
        vocabulary = logits.shape[1]
        if self.allowed_token_ids:
            allowed = torch.zeros(vocabulary, dtype=torch.bool, device=logits.device)
            allowed[[token for token in self.allowed_token_ids if token < vocabulary]] = True
            own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
            logits = logits.masked_fill(~(allowed | own), -math.inf)
        if self.logit_bias:
            bias = torch.zeros(vocabulary, device=logits.device)
            for token, value in self.logit_bias:
                if token < vocabulary:
                    bias[token] += value
            logits = logits + bias
        if self.repetition_penalty != 1.0:
            scaled = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen > 0, scaled, logits)
        return logits - self.frequency_penalty * sampled - self.presence_penalty * (sampled > 0)


@dataclass(frozen=True, kw_only=True)
class AdjustmentFamily:
    """One penalty alone, at evenly spaced values, between which others are interpolated.

    Attributes:
        name: of the penalty.
        least, step: the first value and the step to the next; of the logarithm if `logarithmic`.
        count: of values.
    """

    name: str
    least: float
    step: float
    count: int
    logarithmic: bool = False

    def at(self, place: float) -> Adjustment:
        """The adjustment at a place between 0 and `count` - 1."""
        value = self.least + self.step * place
        penalty: dict[str, Any] = {self.name: math.exp(value) if self.logarithmic else value}
        return Adjustment(**penalty)

    @property
    def grid(self) -> list[Adjustment]:
        return [self.at(place) for place in range(self.count)]

    def place(self, adjustment: Adjustment) -> float | None:
        """Place of an adjustment on the grid; None if it is of another kind."""
        value = getattr(adjustment, self.name)
        if adjustment != replace(Adjustment(), **{self.name: value}):
            return None
        return ((math.log(value) if self.logarithmic else value) - self.least) / self.step


FAMILIES = (
    AdjustmentFamily(name="presence_penalty", least=-2.0, step=0.5, count=9),
    AdjustmentFamily(name="frequency_penalty", least=-1.0, step=0.25, count=13),
    AdjustmentFamily(name="repetition_penalty", least=math.log(0.75), step=0.1, count=11, logarithmic=True),
)
