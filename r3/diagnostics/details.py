"""Single tokens of a step for the report: a uniform draw, and those whose log-probabilities are furthest apart.

Which tokens are drawn depends on their samples and positions alone, through a hash: any split over micro-batches and
ranks gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from r3.diagnostics.chosen_tokens import Tokens, priorities
from r3.errors import DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self

KEEP = 1024
WORST = 16
CONTEXT_TOKENS = 24
"""How many tokens before and after a worst one are shown."""

_LAST = torch.iinfo(torch.int64).max
_FIRST = torch.iinfo(torch.int64).min


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDetails:
    """Tokens of one step, and how many they were chosen from.

    Attributes:
        drawn: at most `keep` tokens, drawn uniformly, in the order of their hashes.
        furthest: at most `worst` tokens with the largest |d|, replayed where it is known, else live; largest first,
            equal ones in the order of their hashes.
        tokens: how many tokens were seen.
        left_out: how many more were masked in, but had a log-probability that is not finite.
        keep, worst: the most that are kept of each.
    """

    drawn: Tokens
    furthest: Tokens
    tokens: int = 0
    left_out: int = 0
    keep: int = KEEP
    worst: int = WORST

    @classmethod
    def from_tensors(
        cls,
        rollout: Tensor,
        mask: Tensor,
        *,
        live: Tensor | None,
        replayed: Tensor | None,
        token_ids: Tensor,
        sample_ids: Tensor,
        positions: Tensor,
        parted: Tensor | None = None,
        keep: int = KEEP,
        worst: int = WORST,
    ) -> Self:
        """The chosen ones among the tokens where `mask` is true.

        Args:
            rollout, live, replayed: floating-point log-probabilities in nats, of one shape, flat or [R, N]. `live` or
                `replayed` may be None, not both.
            mask: bool of that shape.
            token_ids, sample_ids, positions: int64 of that shape, any value where `mask` is false. A position is that
                of the token itself within its sample's sequence; a sample and a position together name one token.
            parted: bool `[..., L]`, the layers in which live and replayed routing chose different experts.

        Waits for the device once. Raises `DiagnosticsError` for other shapes, dtypes or devices.
        """
        sides = {name: side for name, side in (("live", live), ("replayed", replayed)) if side is not None}
        _check(rollout, mask, sides, (token_ids, sample_ids, positions), parted, keep, worst)
        columns = {"rollout": rollout, **sides}
        values = torch.stack([side.detach().flatten().double() for side in columns.values()], 1)
        ids = torch.stack([sample_ids.flatten(), position := positions.flatten(), token_ids.flatten()], 1)
        masked_in = mask.flatten()
        usable = masked_in & values.isfinite().all(1)
        priority = priorities(sample_ids.flatten(), position)
        size = (values[:, -1] - values[:, 0]).abs()
        at = torch.cat([_first(priority, usable, keep), _largest(size, priority, usable, worst)])
        layers = ids.new_empty(len(ids), 0) if parted is None else parted.flatten(0, -2).long()
        counts = torch.stack([usable.sum(), masked_in.sum()])
        # One tensor, so that there is one transfer: float64 travels as the integers that its bits are.
        parts = [usable[at, None].long(), ids[at], priority[at, None], values[at].view(torch.int64), layers[at]]
        sent = torch.cat([torch.cat(parts, 1).flatten(), counts]).cpu()
        seen, asked = sent[-2:].tolist()
        table = sent[:-2].view(len(at), 1 + ids.shape[1] + 1 + values.shape[1] + layers.shape[1])
        tokens = Tokens.from_table(table[:, 1:], tuple(columns), n_layers=None if parted is None else parted.shape[-1])
        first = torch.arange(len(at)) < min(keep, len(ids))
        real = table[:, 0] > 0
        return cls(
            drawn=tokens.select((first & real).nonzero()[:, 0]),
            furthest=tokens.select((~first & real).nonzero()[:, 0]),
            tokens=seen,
            left_out=asked - seen,
            keep=keep,
            worst=worst,
        )._ordered()

    @classmethod
    def empty(cls, *, keep: int = KEEP, worst: int = WORST) -> Self:
        """The neutral element of `merge`: no tokens."""
        return cls(drawn=Tokens.none(), furthest=Tokens.none(), keep=keep, worst=worst)

    def merge(self, other: Self) -> Self:
        """As if the tokens of both had come in one call.

        Raises `DiagnosticsError` if the two keep different numbers of tokens or know different things of them.
        """
        if (self.keep, self.worst) != (other.keep, other.worst):
            raise DiagnosticsError(
                f"details of different kinds cannot be merged: keep {self.keep} and {other.keep}, worst {self.worst} "
                f"and {other.worst}; use the same numbers on every rank"
            )
        return type(self)(
            drawn=Tokens.cat(self.drawn, other.drawn),
            furthest=Tokens.cat(self.furthest, other.furthest),
            tokens=self.tokens + other.tokens,
            left_out=self.left_out + other.left_out,
            keep=self.keep,
            worst=self.worst,
        )._ordered()

    def __add__(self, other: Self) -> Self:
        return self.merge(other) if isinstance(other, TokenDetails) else NotImplemented

    def __radd__(self, other: object) -> Self:
        # The builtin `sum` starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def gather(self, group: dist.ProcessGroup | None = None) -> Self:
        """The tokens of all ranks of `group` (default: all), the same on each; a collective call.

        Without an initialised process group there is one rank. Waits no longer than the group's own timeout.
        """
        if not dist.is_initialized():
            if group is not None:
                raise DiagnosticsError("gather got a group, but torch.distributed is not initialised")
            return self
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, self, group=group)
        return sum(found[1:], found[0])

    def record(
        self,
        decode: Callable[[list[int]], str],
        sequences: Callable[[int], list[int]],
        layer_ids: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The keys "tokens" and "worst" of a line of `details.jsonl`, beside how many tokens there were.

        Args:
            decode: a tokenizer's, of a list of token ids.
            sequences: the token ids of a sample, prompt included, by its number.
            layer_ids: the L decoder-layer numbers of `parted` (default 0 to L - 1).

        Raises `DiagnosticsError` if a worst token is not where its sample's sequence has it.
        """
        tokens = self.drawn
        return {
            "tokens": {name: _rounded(getattr(tokens, name)) for name in ("live", "replayed", "rollout")},
            "tokens_seen": self.tokens,
            "tokens_left_out": self.left_out,
            "worst": [_told(self.furthest, row, decode, sequences, layer_ids) for row in range(len(self.furthest))],
        }

    def _ordered(self) -> Self:
        drawn, furthest = self.drawn, self.furthest
        drawn = drawn.select(drawn.priority.argsort(stable=True)[: self.keep])
        furthest = furthest.select(furthest.priority.argsort(stable=True))
        furthest = furthest.select(furthest.size.argsort(stable=True, descending=True)[: self.worst])
        names = {name: getattr(self, name) for name in ("tokens", "left_out", "keep", "worst")}
        return type(self)(drawn=drawn, furthest=furthest, **names)


def _first(priority: Tensor, usable: Tensor, count: int) -> Tensor:
    """Where the `count` smallest priorities are; with fewer usable tokens, others make up the number."""
    return priority.masked_fill(~usable, _LAST).topk(min(count, len(priority)), largest=False).indices


def _largest(size: Tensor, priority: Tensor, usable: Tensor, count: int) -> Tensor:
    """Where the `count` largest sizes are, among equal ones those of the smallest priorities."""
    count = min(count, len(size))
    if not count:
        return torch.empty(0, dtype=torch.int64, device=size.device)
    size = torch.where(usable, size, -1.0)
    smallest = size.topk(count).values[-1]
    # All above the smallest chosen one are in; those equal to it compete for what is left.
    key = torch.where(size > smallest, _FIRST, torch.where(size == smallest, priority, _LAST))
    return key.topk(count, largest=False).indices


def _told(
    tokens: Tokens,
    row: int,
    decode: Callable[[list[int]], str],
    sequences: Callable[[int], list[int]],
    layer_ids: Sequence[int] | None,
) -> dict[str, Any]:
    sample, position, token = (int(ids[row]) for ids in (tokens.sample, tokens.position, tokens.token_id))
    sequence = sequences(sample)
    if not 0 <= position < len(sequence) or sequence[position] != token:
        there = sequence[position] if 0 <= position < len(sequence) else f"the end, after {len(sequence)} tokens"
        raise DiagnosticsError(
            f"details: expected token {token} at position {position} of sample {sample}, got {there}; positions count "
            f"from the start of the prompt, and are those of the sampled tokens, not of the rows before them"
        )
    layers = None
    if tokens.parted is not None:
        at = tokens.parted[row].nonzero()[:, 0].tolist()
        layers = at if layer_ids is None else [int(layer_ids[i]) for i in at]
    sides = {name: getattr(tokens, name) for name in ("live", "replayed", "rollout")}
    return {
        "sample": sample,
        "position": position,
        "token_id": token,
        "token": decode([token]),
        "before": decode(list(sequence[max(0, position - CONTEXT_TOKENS) : position])),
        "after": decode(list(sequence[position + 1 : position + 1 + CONTEXT_TOKENS])),
        **{name: None if side is None else float(side[row]) for name, side in sides.items()},
        "layers": layers,
    }


def _rounded(side: Tensor | None) -> list[float] | None:
    # A drawing shows no more digits than these, and the file has them in every line.
    return None if side is None else [round(value, 6) for value in side.tolist()]


def _check(
    rollout: Tensor,
    mask: Tensor,
    sides: dict[str, Tensor],
    ids: Sequence[Tensor],
    parted: Tensor | None,
    keep: int,
    worst: int,
) -> None:
    problems = []
    named = dict(zip(("token_ids", "sample_ids", "positions"), ids, strict=True))
    everything = {"rollout": rollout, "mask": mask, **sides, **named} | ({} if parted is None else {"parted": parted})
    if not sides:
        problems.append("live, replayed: expected at least one of them, got None twice")
    for name, tensor in everything.items():
        shape = tensor.shape[:-1] if name == "parted" else tensor.shape
        if shape != rollout.shape:
            problems.append(f"{name}: expected the shape {list(rollout.shape)} of rollout, got {list(shape)}")
        if tensor.device != rollout.device:
            problems.append(f"{name}: expected the device {rollout.device} of rollout, got {tensor.device}")
        if name in ("mask", "parted") and tensor.dtype != torch.bool:
            problems.append(f"{name}: expected torch.bool, got {tensor.dtype}")
        if name in named and tensor.dtype != torch.int64:
            problems.append(f"{name}: expected torch.int64, got {tensor.dtype}")
        if name in ("rollout", "live", "replayed") and not tensor.dtype.is_floating_point:
            problems.append(f"{name}: expected floating-point log-probabilities, got {tensor.dtype}")
    if keep < 0 or worst < 0:
        problems.append(f"keep, worst: expected numbers from 0 up, got {keep} and {worst}")
    if problems:
        raise DiagnosticsError(f"details cannot be taken from these tensors:{summary(problems)}")
