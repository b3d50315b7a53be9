"""The interface of a running engine that a weight sync needs."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, get_args

from r3.entry_points import WORKER_EXTENSION
from r3.errors import SyncError, summary
from r3.weight_sync.protocol import Reply

RunningRequests = Literal["wait", "abort", "keep"]


class Engine(ABC):
    """A running vLLM engine: all workers of all its data-parallel ranks, or of those that one client reaches.

    Every method returns or raises within its `timeout_s`, also when the engine has died or was stopped. A call that
    timed out may still run in the engine; calls that follow come after it, in order, and never get its answer.

    Attributes:
        name: for messages.
        remedy: how to reach the data-parallel ranks that this client does not.
        in_this_process: whether its workers are in this process.
    """

    name: str
    remedy: str
    in_this_process: bool = False

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Reply]:
        """One reply of every worker of every data-parallel rank to `method(*args)`.

        Args:
            method: of the worker extension. Replies are dictionaries with at least "rank"; those with an "error" are
                returned like any other. "world_size" (workers of one engine core), "dp_rank" and "dp_size" are added if
                the worker does not report them.
            args: None, bool, int, float, str, lists, and dictionaries with str keys: what JSON carries. Integers from
                -2^63 to 2^64 - 1 arrive exact on every way, whatever is usual for JSON: both ends are Python, and
                msgpack inside vLLM has these limits.
            timeout_s: of the whole call.

        Raises:
            SyncError: the engine has no such method; no answer in time; the engine or a worker died, which is noticed
                when it happens; the method raised; or workers are missing among the replies.
        """
        replies = self.replies(method, args, timeout_s)
        require_complete(replies, f"{self.name}: {method}", self.remedy)
        return replies

    @abstractmethod
    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        """As `call`, for the ranks that this client reaches, without the check that all have answered."""

    @abstractmethod
    def pause(self, timeout_s: float) -> bool:
        """Stop scheduling: no request runs when this returns, and none until `resume`. Works on a paused engine too.

        Returns:
            Whether the engine was serving before. Only then may a caller that gives up, having touched no weight,
            resume it: an engine that was paused may hold half-loaded weights of a sync that failed.

        Raises:
            SyncError: not paused in time, or it must be idle and is not. An engine that was serving goes on serving.
        """

    @abstractmethod
    def resume(self, timeout_s: float) -> None:
        """Serve again, after `pause` and `refuse`; nothing happens if the engine serves.

        Raises:
            SyncError: no answer in time, or the engine died.
        """

    @abstractmethod
    def refuse(self, cause: str) -> None:
        """Let requests to a paused engine raise `SyncError(cause)` from here on, until `resume`.

        On a server they wait in vLLM's queue instead, until it is resumed or the client gives up.
        """

    @abstractmethod
    def reset_caches(self, timeout_s: float) -> None:
        """Empty the prefix cache (and a KV connector's); of multimodal models also the processor's and the encoder's.

        Requests that a pause has frozen lose their keys and values, which are then recomputed.

        Raises:
            SyncError: vLLM did not reset it on every rank, no answer in time, or the engine died.
        """

    @abstractmethod
    def set_weight_version(self, version: int, timeout_s: float) -> None:
        """Set the weight version that vLLM shows (0.27 and later); nothing happens where it has none.

        Raises:
            SyncError: no answer in time, or the engine died.
        """

    def cause_of_death(self) -> str | None:
        """Why the engine cannot answer any more, as far as this process knows without asking; else None."""
        return None

    def close(self) -> None:  # noqa: B027
        """Release the adapter's resources. A paused engine stays paused, since its weights may be half-loaded."""


def require_complete(replies: Sequence[Reply], where: str, remedy: str) -> None:
    """Raise `SyncError` unless every worker of every data-parallel rank is there equally often.

    Once for one engine; as often as there are replicas in a list of engines. Engines of another shape (data-parallel
    ranks, workers of one) are counted by themselves.
    """
    odd = [reply for reply in replies if not {"rank", "world_size", "dp_rank", "dp_size"} <= reply.keys()]
    if odd or not replies:
        raise SyncError(f"{where}: expected dictionaries with rank, dp_rank, world_size and dp_size, got {odd[:1]}")
    for dp_size, world_size in sorted({(reply["dp_size"], reply["world_size"]) for reply in replies}):
        alike = [reply for reply in replies if (reply["dp_size"], reply["world_size"]) == (dp_size, world_size)]
        _require_all_ranks(alike, dp_size, world_size, where, remedy)


def _require_all_ranks(replies: Sequence[Reply], dp_size: int, world_size: int, where: str, remedy: str) -> None:
    """Of engines of one shape."""
    seen = Counter((reply["dp_rank"], reply["rank"]) for reply in replies)
    expected = set(product(range(dp_size), range(world_size)))
    copies = max(seen.values())
    problems = [
        f"data-parallel rank {dp_rank}, worker rank {rank}: {seen[dp_rank, rank]} of {copies} replies"
        for dp_rank, rank in sorted(expected)
        if seen[dp_rank, rank] < copies
    ]
    problems += [f"unexpected: data-parallel rank {d}, worker rank {r}" for d, r in sorted(seen.keys() - expected)]
    if problems:
        lost = {dp_rank for dp_rank in range(dp_size) if not any(d == dp_rank for d, _ in seen)}
        raise SyncError(
            f"{where}: expected replies of {world_size} workers on each of {dp_size} data-parallel ranks, got "
            f"{len(replies)}:{summary(problems)}" + (f"\n{remedy}" if lost else "")
        )


def require_replies(answer: Any, where: str) -> list[Reply]:
    """`answer` if it is a list of dictionaries.

    Raises:
        SyncError: it is not: the method is not one of r3's worker extension.
    """
    if not isinstance(answer, list) or not all(isinstance(reply, dict) for reply in answer):
        raise SyncError(f"{where}: expected a list with a dictionary of each worker, got {answer!r:.200}")
    return answer


def failed(where: str, method: str, error: BaseException | str, dead: str | None = None) -> SyncError:
    """The `SyncError` for a call that raised in the engine; `dead` says why the engine died, if it did."""
    text = str(error) or type(error).__name__
    if dead is not None:
        return SyncError(f"{where}: {dead} in {method} ({text}). Start it anew, then sync")
    if f"Method {method!r} is not implemented" in text or f"has no attribute {method!r}" in text:
        return SyncError(
            f"{where}: its workers have no method {method!r}: start the engine with "
            f"worker_extension_cls={WORKER_EXTENSION!r} of this version of r3 "
            "(r3.capture.engine_kwargs and server_args do)"
        )
    return SyncError(f"{where}: {method} failed: {text}")


def checked_mode(on_running: str) -> RunningRequests:
    """`on_running` if it is a mode.

    Raises:
        SyncError: it is none.
    """
    for mode in get_args(RunningRequests):
        if on_running == mode:
            return mode
    raise SyncError(f"on_running: expected one of {', '.join(get_args(RunningRequests))}, got {on_running!r}")
