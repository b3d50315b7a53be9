"""Which rank sends which weight: each is dealt to one sender, evenly by bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dealt:
    """Attributes:
    nbytes: that are sent of a weight.
    together: of its `LazyWeight`; weights with one in common go to one sender.
    """

    nbytes: int
    together: tuple[Any, ...]


def deal(weights: Sequence[Dealt], senders: int) -> list[list[int]]:
    """Numbers of the weights that each sender gets, in order. The largest units first, each to who has least so far.

    No sender has more than an equal share and one unit: a weight, or those that are made together.
    """
    units = sorted(_units(weights), key=lambda unit: -sum(weights[number].nbytes for number in unit))
    shares: list[list[int]] = [[] for _ in range(senders)]
    loads = [0] * senders
    for unit in units:
        least = loads.index(min(loads))
        shares[least] += unit
        loads[least] += sum(weights[number].nbytes for number in unit)
    return [sorted(share) for share in shares]


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
