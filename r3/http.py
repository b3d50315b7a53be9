"""One vLLM server, asked over HTTP with nothing but the standard library."""

import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from r3.proxy import open_url

FAILURES = (OSError, http.client.HTTPException)
"""What `HttpClient.send` raises if the server could not be reached or did not answer."""

MIN_TIMEOUT_S = 1e-3  # a socket takes 0 for "do not wait"


class StatusError(Exception):
    """An answer with an error status.

    Attributes:
        status: the number.
        reason: the server's word for it.
        content: the body.
    """

    def __init__(self, status: int, reason: str, content: bytes) -> None:
        super().__init__(status, reason, content)
        self.status, self.reason, self.content = status, reason, content

    @property
    def passes(self) -> bool:
        """Whether vLLM says that the same request may succeed later, as of a paused engine (from 0.33).

        That answer has status 503, as have those of a full queue ("Service Unavailable"), of an engine that has died
        and of gateways: the type of error tells them apart.
        """
        try:
            return self.status == 503 and json.loads(self.content)["error"]["type"] == "ServiceUnavailableError"
        except (ValueError, LookupError, TypeError):
            return False


@dataclass(frozen=True, kw_only=True)
class HttpClient:
    """Sends requests with JSON to a server.

    Attributes:
        base: `http://host:port`, as `base_url` returns it.
        api_key: what the server was started with as `--api-key`.
    """

    base: str
    api_key: str | None = field(default=None, repr=False)

    def send(self, path: str, data: bytes | None, timeout_s: float) -> bytes:
        """What `path` answers with; a POST where there is `data`, JSON.

        Args:
            path: begins with a slash.
            data: the body.
            timeout_s: longest wait for the connection, and for each part of the answer.

        Raises:
            StatusError: an error status.
            OSError, http.client.HTTPException: one of `FAILURES`.
            ValueError: a URL that is none.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.base}{path}", data, headers)
        try:
            with open_url(request, timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise StatusError(error.code, error.reason, error.read()) from error

    def send_patiently(self, path: str, data: bytes | None, timeout_s: float) -> bytes:
        """`send`, again and again for `timeout_s` in all while the answer is an error that passes.

        Raises:
            StatusError: another error, or one that has not passed by then.
            OSError, http.client.HTTPException, ValueError: as `send`.
        """
        end = time.monotonic() + timeout_s
        waits_s = retry_waits_s()
        while True:
            try:
                return self.send(path, data, max(end - time.monotonic(), MIN_TIMEOUT_S))
            except StatusError as error:
                wait_s = next(waits_s)
                if not error.passes or time.monotonic() + wait_s >= end:
                    raise
            time.sleep(wait_s)


def retry_waits_s() -> Iterator[float]:
    """Seconds to wait between tries: twice as long each time up to a second, then a second for ever."""
    return itertools.chain((0.05, 0.1, 0.2, 0.4, 0.8), itertools.repeat(1.0))


def base_url(url: str) -> str:
    """`url` without `/v1` at its end."""
    return url.rstrip("/").removesuffix("/v1")


def to_json(body: Any) -> bytes | None:
    """A request's body; None for None."""
    return None if body is None else json.dumps(body).encode()


def from_json(content: bytes) -> Any:
    """An answer's body; None for an empty one.

    Raises:
        ValueError: no JSON.
    """
    return json.loads(content) if content else None


def cause_of(error: BaseException) -> Any:
    """What lies under an error of urllib; any other error itself."""
    return getattr(error, "reason", None) or error


def words_of(cause: Any) -> str:
    """The text of an error, or its class where it has none."""
    return str(cause) or type(cause).__name__
