"""Adapter for a `vllm serve` process, reached by URL through the control routes of its development mode."""

import json
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from r3.errors import SyncError
from r3.http import FAILURES, HttpClient, StatusError, base_url, cause_of, from_json, to_json, words_of
from r3.proxy import naming_proxy
from r3.weight_sync.engines.deadline import Deadline, answer_of, in_thread
from r3.weight_sync.engines.engine import Engine, Reply, RunningRequests, failed, require_replies

HEALTH_EVERY_S = 1.0
HEALTH_TIMEOUT_S = 5.0


class ServerEngine(Engine):
    """A server with `VLLM_SERVER_DEV_MODE=1`, whose routes are the same from 0.22 to 0.33.

    A paused server queues requests; it stays paused when this process ends, until a sync commits. One of vLLM 0.33 that
    was not started with `server_args` rejects them with status 503, unless `on_running` is "keep".

    Args:
        url: `http://host:port`.
        on_running: what a pause does with running requests: "wait" for their end, "abort" them, or "keep" them frozen.
        api_key: what the server was started with as `--api-key`.

    Raises:
        SyncError: no such URL.
    """

    remedy = (
        "vllm serve answers for the first of its data-parallel ranks alone. Give each rank a port of its own "
        "(--data-parallel-multi-port-external-lb, or one server a rank with --data-parallel-rank), and the list of all "
        "URLs"
    )

    def __init__(self, url: str, on_running: RunningRequests, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise SyncError(f"engine: expected http://host:port, got {url!r}")
        self.name = base_url(url)
        self.api_key = api_key
        self._on_running = on_running
        self._client = HttpClient(base=self.name, api_key=api_key)
        self._sizes: tuple[int, int] | None = None

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Reply]:
        deadline = Deadline(timeout_s)
        dp_size, world_size = self._shape(deadline)
        try:
            # Left out, timeout is None: what a worker answers after vLLM's is taken for the answer to its next call.
            body = {"method": method, "args": list(args)}
            answer = self._ask("/collective_rpc", deadline, body, operation=method)
        except TypeError as error:
            raise SyncError(f"{self.name}: {method}: expected arguments that JSON carries: {error}") from error
        where = f"{self.name}: {method}"
        replies = require_replies(answer.get("results") if isinstance(answer, dict) else answer, where)
        # The server's size of the group: engine cores of a dense model do not know that they are ranks.
        return [{"world_size": world_size, "dp_rank": 0} | reply | {"dp_size": dp_size} for reply in replies]

    def pause(self, timeout_s: float) -> bool:
        deadline = Deadline(timeout_s)
        served = not self._ask("/is_paused", deadline)["is_paused"]
        # Requests that an earlier pause has frozen must not be drained now, maybe with half-loaded weights.
        mode = "keep" if not served and self._on_running == "wait" else self._on_running
        try:
            self._ask(f"/pause?mode={mode}", deadline, {})
        except BaseException:
            if served:
                # Queued behind the pause; waiting for it would take time that is not there.
                in_thread(lambda: self._client.send("/resume", b"{}", HEALTH_TIMEOUT_S))
            raise
        return served

    def resume(self, timeout_s: float) -> None:
        self._ask("/resume", Deadline(timeout_s), {})

    def refuse(self, cause: str) -> None:
        """Do nothing: requests to a paused server wait, in its queue or (`HttpClient.send_patiently`) in the client."""

    def reset_caches(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        # With reset_running_requests a reset that fails is an error also of 0.22, which does not answer whether it was.
        answer = self._ask("/reset_prefix_cache?reset_running_requests=true&reset_external=true", deadline, {})
        if answer is not None and not answer["success"]:
            raise SyncError(
                f"{self.name}: vLLM did not reset its prefix cache, which holds keys of the old weights: requests or "
                "transfers hold blocks of it"
            )
        self._ask("/reset_mm_cache", deadline, {})
        self._ask("/reset_encoder_cache", deadline, {})

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        self._ask("/update_weight_version", Deadline(timeout_s), {"new_version": str(version)}, absent_ok=True)

    def _shape(self, deadline: Deadline) -> tuple[int, int]:
        """(data-parallel ranks, workers of one), asked once."""
        if self._sizes is None:
            all_workers, workers_of_one = (
                self._ask(f"/get_world_size?include_dp={include}", deadline)["world_size"]
                for include in ("true", "false")
            )
            self._sizes = all_workers // workers_of_one, workers_of_one
        return self._sizes

    def _ask(
        self,
        path: str,
        deadline: Deadline,
        body: dict[str, Any] | None = None,
        *,
        operation: str | None = None,
        absent_ok: bool = False,
    ) -> Any:
        """The JSON answer of `path`, None if it is empty. POST if there is a `body`, else GET."""
        with naming_proxy(self.name):
            return self._answer(path, deadline, body, operation or path.partition("?")[0], absent_ok)

    def _answer(
        self, path: str, deadline: Deadline, body: dict[str, Any] | None, operation: str, absent_ok: bool
    ) -> Any:
        data = to_json(body)
        timeout_s = deadline.left_s + 1.0  # the deadline speaks first
        future = in_thread(lambda: self._client.send(path, data, timeout_s))
        try:
            content: bytes = answer_of(future, deadline, where=self.name, operation=operation, dead=_Health(self).cause)
        except StatusError as error:
            if error.status == 404 and absent_ok:
                return None
            raise self._explained(error, operation) from error
        except FAILURES as error:
            raise SyncError(
                f"{self.name}: the connection failed in {operation}: {words_of(cause_of(error))}. Is the server up, "
                "and is this its address? If it has died, start it anew, then sync"
            ) from error
        try:
            return from_json(content)
        except ValueError as error:
            raise SyncError(f"{self.name}: {operation}: expected JSON, got {content[:80]!r}: is this vLLM?") from error

    def _explained(self, error: StatusError, operation: str) -> SyncError:
        message = _message(error.content) or error.reason
        if error.status == 404:
            return SyncError(
                f"{self.name}: no control routes ({operation}: status 404): start vllm serve with "
                "VLLM_SERVER_DEV_MODE=1 in its environment (the command is r3.capture.server_command's), at "
                "an address that only the trainer reaches"
            )
        if error.status in (401, 403):
            return SyncError(f"{self.name}: {operation}: status {error.status}: expected the server's api_key")
        told = error.status == 503 or "EngineDead" in message or "EngineCore encountered" in message
        # 0.33 hides from clients what killed the engine: its health tells.
        if told or (error.status >= 500 and self._is_dead()):
            return SyncError(f"{self.name}: the engine has died in {operation} ({message}). Start it anew, then sync")
        return failed(f"{self.name} (status {error.status})", operation, message)

    def _is_dead(self) -> bool:
        try:
            self._client.send("/health", None, HEALTH_TIMEOUT_S)
        except StatusError as error:
            return error.status == 503
        except FAILURES as error:
            return isinstance(cause_of(error), ConnectionRefusedError)  # it ends soon after its engine
        return False


class _Health:
    """Asks the server from time to time, while a call waits for its answer, whether the engine is alive.

    vLLM's requests to an engine core that has died are never answered, and some versions do not end the server.
    """

    def __init__(self, server: ServerEngine) -> None:
        self._server = server
        self._asked = time.monotonic()
        self._answer: Future | None = None

    def cause(self) -> str | None:
        if self._answer is None:
            if time.monotonic() - self._asked >= HEALTH_EVERY_S:
                self._asked = time.monotonic()
                self._answer = in_thread(lambda: self._server._client.send("/health", None, HEALTH_TIMEOUT_S))
            return None
        if not self._answer.done():
            return None
        error, self._answer = self._answer.exception(), None
        if isinstance(error, StatusError) and error.status == 503:
            return "the engine has died (status 503 of /health)"
        if error is not None and isinstance(cause_of(error), ConnectionRefusedError):
            return "the server has gone (connection refused)"
        return None


def _message(content: bytes) -> str:
    """The message of an error response, in any of the forms that vLLM has used."""
    text = content.decode(errors="replace")
    try:
        body = json.loads(text)
        error = body.get("error", body.get("detail", body.get("message", text)))
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, AttributeError, KeyError):
        return text[:500]
