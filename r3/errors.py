"""Everything that r3 raises on purpose: one root, each with the standard exception that a caller would expect."""

from collections.abc import Iterable

SHOWN = 16


class R3Error(Exception):
    """Root of all errors raised by r3."""


class ConfigError(R3Error, ValueError):
    """Settings that are unknown, malformed or contradict each other."""


class RoutingError(R3Error, ValueError):
    """Routing of the wrong shape, dtype or content."""


class UnsupportedModelError(R3Error, TypeError):
    """A model whose routers cannot be replayed exactly."""


class ReplayError(R3Error, RuntimeError):
    """A forward that did not do what replay promises."""


class ParallelError(R3Error, RuntimeError):
    """A model, or input, that cannot be split over ranks or packed; raised on all ranks that would wait."""


class CaptureError(R3Error, RuntimeError):
    """Rollouts whose routing is missing or cannot be right."""


class SyncError(R3Error, RuntimeError):
    """A weight sync that did not commit on every worker."""


class EngineLostError(SyncError):
    """Engines that died or did not answer during a sync were removed from it; the others can be pushed to again."""


class DiagnosticsError(R3Error, ValueError):
    """Input that a metric or report cannot be made from."""


class AlarmError(R3Error, RuntimeError):
    """A metric beyond the bound at which the settings say to stop, or one that an alarm watches and that is missing."""


def summary(problems: Iterable[str]) -> str:
    """The first `SHOWN` of `problems` as indented lines, and how many there are beyond."""
    found = list(problems)
    lines = [f"\n  {problem}" for problem in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"\n  ... and {len(found) - SHOWN} more")
    return "".join(lines)
