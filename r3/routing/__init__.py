"""The 4-D routing tensor `[B, S, L, K]`: its type and the checks on its content."""

from r3.routing.checks import bad_rows, check_rows
from r3.routing.types import RolloutRouting, RoutingSpec, compact_dtype

__all__ = ["RolloutRouting", "RoutingSpec", "bad_rows", "check_rows", "compact_dtype"]
