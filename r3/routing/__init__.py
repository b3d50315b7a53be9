"""The 4-D routing tensor `[B, S, L, K]`: its type, the checks on its content, and how it is laid out."""

from r3.routing.checks import bad_rows, check_rows
from r3.routing.layout import Packing, pad, shard, unshard
from r3.routing.rows import routing_of
from r3.routing.spec import RoutingSpec, compact_dtype
from r3.routing.transfer import prefetch
from r3.routing.types import RolloutRouting

__all__ = [
    "Packing",
    "RolloutRouting",
    "RoutingSpec",
    "bad_rows",
    "check_rows",
    "compact_dtype",
    "pad",
    "prefetch",
    "routing_of",
    "shard",
    "unshard",
]
