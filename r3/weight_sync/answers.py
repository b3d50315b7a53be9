"""What the workers of all engines answered, taken together."""

from r3.errors import SyncError, summary
from r3.weight_sync.calls import who
from r3.weight_sync.engines import Reply


def draft_model(replies: list[Reply]) -> str:
    """What became of the engines' draft models."""
    return "; ".join(sorted({reply["draft"] for reply in replies} - {""}))


def kept_by(replies: list[Reply]) -> tuple[str, ...]:
    """The layers that workers keep, of their answers to `r3_begin`."""
    return tuple(sorted({layer for reply in replies for layers in reply["kept"].values() for layer in layers}))


def require_found(frozen: tuple[str, ...], replies: list[Reply]) -> None:
    """Raise `SyncError` for a path of `frozen` below which no worker has a layer."""
    absent = [path for path in frozen if not any(reply["kept"][path] for reply in replies)]
    if absent:
        raise SyncError(
            f"frozen: the engine has no layers below {absent}; expected module paths of its checkpoint, such as "
            "'model.visual' (the names of named_weights begin with them)"
        )


def require_equal(answers: list[Reply], version: int, digest: int) -> None:
    wrong = [f"{who(a)}: version {a['version']}, digest {a['digest']}" for a in answers]
    wrong = [w for w, a in zip(wrong, answers, strict=True) if (a["version"], a["digest"]) != (version, digest)]
    if wrong:
        raise SyncError(f"expected version {version} with digest {digest} on every worker, got:{summary(wrong)}")
