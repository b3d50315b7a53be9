"""Which rank sends which weight: one that holds it whole, or any, so that all send as many bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dealt:
    """Attributes:
    nbytes: that are sent of a weight.
    together: of its `LazyWeight`; weights with one in common go to one sender.
    holders: senders that have it without the others; none if it takes all of them.
    """

    nbytes: int
    together: tuple[Any, ...]
    holders: tuple[int, ...] = ()


def deal(weights: Sequence[Dealt], senders: int) -> list[list[int]]:
    """Numbers of the weights that each sender gets, in order.

    What a few hold comes first, the largest units before the others, each to who has least so far of those that hold
    it. So no sender has more than an equal share and one unit (a weight, or those that are made together), unless it
    holds more.
    """
    units = [
        (_held_by(unit, weights), sum(weights[number].nbytes for number in unit), unit) for unit in _units(weights)
    ]
    shares: list[list[int]] = [[] for _ in range(senders)]
    loads = [0] * senders
    for holders, nbytes, unit in sorted(units, key=lambda each: (not each[0], -each[1])):
        least = min(holders or range(senders), key=lambda sender: (loads[sender], sender))
        shares[least] += unit
        loads[least] += nbytes
    return [sorted(share) for share in shares]


def _held_by(unit: Sequence[int], weights: Sequence[Dealt]) -> list[int]:
    """The senders that hold every weight of `unit`."""
    return sorted(set.intersection(*(set(weights[number].holders) for number in unit)))


def _units(weights: Sequence[Dealt]) -> list[list[int]]:
    """Numbers of the weights that have to go to one sender, in order of the first of each."""
    units: dict[int, list[int]] = {}
    home: dict[int, int] = {}  # unit of what weights are made of, by identity
    for number, weight in enumerate(weights):
        near = sorted({home[id(item)] for item in weight.together if id(item) in home})
        first = near[0] if near else number
        unit = units.setdefault(first, [])
        for other in near[1:]:
            home |= {id(item): first for each in units[other] for item in weights[each].together}
            unit += units.pop(other)
        unit.append(number)
        home |= {id(item): first for item in weight.together}
    return list(units.values())
