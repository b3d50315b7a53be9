"""Check of an engine's weights: whether its workers can be synced, and their state after the last sync."""

from r3.doctor.check import Check
from r3.weight_sync import Engine


def sync_state(name: str, engine: Engine, timeout_s: float) -> Check:
    """Check the state that the workers' extension reports.

    Raises:
        SyncError: no control routes, no extension, or no answer: with the remedy.
    """
    replies = engine.call("r3_status", timeout_s=timeout_s)
    versions = sorted({reply["version"] for reply in replies}, key=lambda version: (version is not None, version))
    states = sorted({reply["state"] for reply in replies})
    detail = f"{len(replies)} workers, {' and '.join(states)}, version {' and '.join(map(_version, versions))}"
    poisoned = [reply for reply in replies if reply["state"] == "poisoned"]
    if poisoned:
        causes = "; ".join(sorted({str(reply["cause"]) for reply in poisoned}))
        return Check(
            name=name,
            status="problem",
            detail=f"{detail}: a sync failed after it had touched weights ({causes}); the engine must not sample",
            remedy="push a complete sync, which heals it, or start the engine anew",
        )
    if len(versions) > 1:
        return Check(
            name=name,
            status="problem",
            detail=f"{detail}: the workers do not have the same weights",
            remedy="push a complete sync, or start the engine anew",
        )
    if states != ["idle"]:
        return Check(
            name=name,
            status="warning",
            detail=f"{detail}: a sync is under way, or its sender has died",
            remedy="let it end; if its sender has died, another push takes over once its lease is over",
        )
    return Check(name=name, status="ok", detail=detail)


def _version(version: int | None) -> str:
    return "unknown (none was synced)" if version is None else str(version)
