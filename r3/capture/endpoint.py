"""Client of one vLLM server by the standard library alone: for checks, not for rollouts."""

from dataclasses import dataclass, field
from typing import Any

from r3.errors import CaptureError
from r3.http import FAILURES, HttpClient, StatusError, base_url, cause_of, from_json, to_json, words_of
from r3.proxy import naming_proxy


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server. Each request returns its JSON, None for an empty answer, or raises an error in plain words.

    A request that a paused engine rejects (vLLM 0.33) is sent again until the engine takes it: it waits for the end of
    a weight sync, as it does in the queue of other releases.

    Attributes:
        url: `http://host:port`, with or without `/v1` at its end.
        timeout_s: of each request, all its tries together.
        api_key: what the server was started with as `--api-key`.
    """

    url: str
    timeout_s: float = 60.0
    api_key: str | None = field(default=None, repr=False)

    @property
    def base(self) -> str:
        """The URL without `/v1`."""
        return base_url(self.url)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer of `path`, None if it is empty. POST if there is a `body`, else GET.

        Raises:
            CaptureError: no answer in time, an error status with what the server said, or no JSON; with the proxy of
                the environment, if one is between.
        """
        with naming_proxy(self.base):
            return self._ask(path, body)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        url = f"{self.base}{path}"
        if not url.startswith(("http://", "https://")):
            raise CaptureError(f"url: expected http://host:port, got {self.url!r}")
        data = to_json(body)
        try:
            content = HttpClient(base=self.base, api_key=self.api_key).send_patiently(path, data, self.timeout_s)
        except StatusError as error:
            message = error.content[:500].decode(errors="replace")
            if error.passes:
                raise CaptureError(
                    f"{url} rejected the request for {self.timeout_s:g} s ({message}). A weight sync took longer, or "
                    "one failed and left the engine paused: a complete sync (WeightSync.push) heals it"
                ) from error
            raise CaptureError(f"{url} answered with status {error.status}: {message or error.reason}") from error
        except (*FAILURES, ValueError) as error:
            cause = cause_of(error)
            waited = f" in {self.timeout_s:g} s" if isinstance(cause, TimeoutError) else ""
            raise CaptureError(
                f"no answer from {url}{waited}: {words_of(cause)}. Is the server up, and is this its "
                "address? vLLM answers only when the model is loaded"
            ) from error
        try:
            return from_json(content)
        except ValueError as error:
            raise CaptureError(f"{url}: expected JSON, got {content[:80]!r}: is this a vLLM server?") from error

    def version(self) -> str:
        """The server's vLLM version.

        Raises:
            CaptureError: as `ask`, or not a vLLM server.
        """
        answer = self.ask("/version")
        if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
            raise CaptureError(f"{self.base}/version: expected vLLM's, got {answer!r:.80}: is this a vLLM server?")
        return answer["version"]

    def model(self) -> str:
        """The name of the server's first model, as requests need it.

        Raises:
            CaptureError: as `ask`, or no model.
        """
        answer = self.ask("/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise CaptureError(f"{self.base}/v1/models: expected a list of models, got {answer!r:.80}") from error
