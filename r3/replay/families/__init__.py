"""Router families that need more than the common mechanism, one small file each.

Most families need nothing: their router is the child `gate` or `router` beside a child `experts`, makes one top-k over
the experts of each token and returns the ids. A family has an entry here if one of these does not hold.
"""

from torch import nn

from r3.replay.families import deepseek_v4, ernie4_5_vl, llama4, refused, top_k_gating, zaya
from r3.replay.families.family import DEFAULT, Family

_FAMILIES: dict[str, Family] = {
    **deepseek_v4.FAMILIES,
    **ernie4_5_vl.FAMILIES,
    **llama4.FAMILIES,
    **refused.FAMILIES,
    **top_k_gating.FAMILIES,
    **zaya.FAMILIES,
}


def family_of(router: nn.Module) -> Family:
    """The entry of `router`'s class, or of a router inside it, for wrappers such as PEFT's."""
    for module in router.modules():
        for cls in type(module).__mro__:  # FSDP2 and r3 subclass
            if cls.__name__ in _FAMILIES:
                return _FAMILIES[cls.__name__]
    return DEFAULT


def has_entry(module: nn.Module) -> bool:
    """Whether `module` itself is of a class that has an entry."""
    return any(cls.__name__ in _FAMILIES for cls in type(module).__mro__)


__all__ = ["Family", "family_of", "has_entry"]
