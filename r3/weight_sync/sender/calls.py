"""Parallel calls to several engines, and checks of the workers' answers."""

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from r3.errors import SyncError, summary
from r3.weight_sync.engines import Engine, Reply
from r3.weight_sync.engines.deadline import in_thread


class ParallelCalls:
    """Calls that run in parallel, each with its own deadline.

    Args:
        calls: what to call.
        check: of all answers, joined, if there are any.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], check: Callable[[list], None] | None = None) -> None:
        self._futures = [in_thread(call) for call in calls]
        self._check = check

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def failed(self) -> bool:
        """Whether a call has failed: that engine will not take part in the transfer."""
        return any(future.done() and future.exception() is not None for future in self._futures)

    def wait(self, timeout_s: float, *, all_of_them: bool = False) -> bool:
        """Wait up to `timeout_s`. Returns whether all are done or one has failed."""
        futures.wait(self._futures, timeout_s, "ALL_COMPLETED" if all_of_them else "FIRST_EXCEPTION")
        return self.failed() or self.done()

    def failures(self) -> dict[int, BaseException]:
        """Wait for all. Errors of those that failed, by their number."""
        futures.wait(self._futures)
        found = {number: future.exception() for number, future in enumerate(self._futures)}
        return {number: error for number, error in found.items() if error is not None}

    def successes(self) -> list[Any]:
        """Wait for all. Answers of those that did not fail."""
        failed = self.failures()
        return [future.result() for number, future in enumerate(self._futures) if number not in failed]

    def result(self) -> list[Any]:
        """All answers as one list. Raises as soon as one call has failed: others may be waiting for it."""
        answers = [reply for answer in self.each() for reply in answer or ()]
        if self._check is not None:
            self._check(answers)
        return answers

    def each(self) -> list[Any]:
        """The answer of each call. Raises as soon as one has failed."""
        futures.wait(self._futures, return_when="FIRST_EXCEPTION")
        errors = [error for f in self._futures if f.done() and (error := f.exception()) is not None]
        if len(errors) > 1:
            raise SyncError(f"{len(errors)} engines failed:{summary(map(str, errors))}") from errors[0]
        if errors:
            raise errors[0]
        return [future.result() for future in self._futures]


def first_failure_of(*calls: ParallelCalls) -> None:
    """Wait for all calls. Raises as soon as one has failed, since the others may be waiting for it."""
    futures.wait([future for call in calls for future in call._futures], return_when="FIRST_EXCEPTION")
    for call in sorted(calls, key=ParallelCalls.failed, reverse=True):
        call.result()


def raise_on_worker_errors(engine: Engine, method: str, replies: list[Reply]) -> list[Reply]:
    """Add the engine's name to each of `replies`. Raises `SyncError` if one is an error."""
    named = [reply | {"engine": engine.name} for reply in replies]
    failed = [f"{worker_name(reply)}: {reply['error']}" for reply in named if "error" in reply]
    if failed:
        raise SyncError(f"{method} failed on {len(failed)} of {len(named)} workers:{summary(failed)}")
    return named


def worker_name(reply: Reply) -> str:
    """Name of the worker that sent a reply, for messages."""
    dp = f", data-parallel rank {reply['dp_rank']}" if reply["dp_size"] > 1 else ""
    return f"{reply['engine']}, worker rank {reply['rank']}{dp}"


def add_note(error: BaseException, note: str) -> None:
    """Add to `error`, which will be raised, what else went wrong."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)


def kept_layers_of(replies: list[Reply]) -> tuple[str, ...]:
    """The layers that workers keep, from their answers to `r3_begin`."""
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
    wrong = [f"{worker_name(a)}: version {a['version']}, digest {a['digest']}" for a in answers]
    wrong = [w for w, a in zip(wrong, answers, strict=True) if (a["version"], a["digest"]) != (version, digest)]
    if wrong:
        raise SyncError(f"expected version {version} with digest {digest} on every worker, got:{summary(wrong)}")


def draft_of(replies: list[Reply]) -> str:
    """What the sync does with the engines' draft models, from the workers' answers to `r3_begin`."""
    return "; ".join(sorted({reply["draft"] for reply in replies} - {""}))
