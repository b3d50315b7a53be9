"""Columns of a few single tokens, and the hash by which tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r3.errors import DiagnosticsError

if TYPE_CHECKING:
    from typing_extensions import Self

SIDES = ("rollout", "live", "replayed")
_IDS = ("sample", "position", "token_id", "priority")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """M tokens on the CPU: int64 `[M]` names, float64 `[M]` log-probabilities in nats, and bool `[M, L]` layers.

    What is not known is None. With no tokens at all, nothing is known.
    """

    sample: Tensor
    position: Tensor
    token_id: Tensor
    priority: Tensor
    rollout: Tensor
    live: Tensor | None = None
    replayed: Tensor | None = None
    parted: Tensor | None = None

    @classmethod
    def from_table(cls, table: Tensor, sides: tuple[str, ...], *, n_layers: int | None) -> Self:
        """From int64 `[M, 4 + sides + L]`: the ids, the bits of the float64 log-probabilities, and 0 or 1 by layer."""
        ids = dict(zip(_IDS, table[:, : len(_IDS)].unbind(1), strict=True))
        values = table[:, len(_IDS) : len(_IDS) + len(sides)].contiguous().view(torch.float64)
        parted = None if n_layers is None else table[:, len(_IDS) + len(sides) :].bool()
        return cls(**ids, **dict(zip(sides, values.unbind(1), strict=True)), parted=parted)

    @classmethod
    def none(cls) -> Self:
        ids = dict.fromkeys(_IDS, torch.empty(0, dtype=torch.int64))
        return cls(**ids, rollout=torch.empty(0, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def size(self) -> Tensor:
        """float64 `[M]`, nats: |train - rollout|, replayed if that is known, else live."""
        train = self.live if self.replayed is None else self.replayed
        return self.rollout if train is None else (train - self.rollout).abs()

    @property
    def kind(self) -> dict[str, int]:
        """What is known of each token, and how wide it is."""
        known = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: column[:1].numel() for name, column in known.items() if column is not None}

    def select(self, at: Tensor) -> Self:
        columns: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        chosen: dict[str, Any] = {name: None if column is None else column[at] for name, column in columns.items()}
        return type(self)(**chosen)

    @classmethod
    def cat(cls, one: Self, other: Self) -> Self:
        """Both, in this order; raises `DiagnosticsError` if they know different things."""
        if not len(one) or not len(other):
            return one if len(one) else other
        if one.kind != other.kind:
            raise DiagnosticsError(
                f"details of different kinds cannot be merged: {_shown(one)} and {_shown(other)}; give the same "
                f"log-probabilities and layers for every micro-batch and on every rank"
            )
        return cls(**{name: torch.cat([getattr(one, name), getattr(other, name)]) for name in one.kind})


def _shown(tokens: Tokens) -> str:
    sides = [name for name in SIDES if getattr(tokens, name) is not None]
    layers = "no layers" if tokens.parted is None else f"{tokens.parted.shape[1]} layers"
    return f"{' and '.join(sides)} with {layers}"


def priorities(sample: Tensor, position: Tensor) -> Tensor:
    """int64 hashes, evenly spread over all of its values, distinct for distinct (sample, position) below 2**32.

    The finaliser of SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    # Integers of tensors wrap on overflow, as the hash wants it.
    mixed = (sample << 32) + position + _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shifted(mixed, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    # `>>` copies the sign; the hash wants zeros.
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
