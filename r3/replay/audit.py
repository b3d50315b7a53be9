"""The audit of a replayed forward: each router was replayed. (That none was twice, the routers see themselves.)"""

from collections.abc import Iterable

from r3.errors import ReplayError, summary
from r3.replay.context import ReplayContext
from r3.replay.patching import RouterPatch


def require_all_replayed(routers: Iterable[RouterPatch], context: ReplayContext) -> None:
    """Raise `ReplayError` with the names of `routers` that did not replay `context`, at the end of its forward."""
    bypassed = [router.site.name for router in routers if not router.replayed(context)]
    if bypassed:
        raise ReplayError(
            "expected every router to be replayed in a forward. These did not run; a replaced block bypasses them "
            "(use_kernels=True, for one), and so does a `forward` put on a router or layer after attach that does not "
            f"go through the one that was there:{summary(bypassed)}"
        )
