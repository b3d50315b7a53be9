"""Requests to a `vllm serve`, by its token-in, token-out route."""

import asyncio
import json

from r3.errors import CaptureError, ConfigError
from r3.http import base_url, words_of
from r3.pool.clients.client import EngineClient, EngineFailedError, RequestAbortedError
from r3.pool.request import Request
from r3.proxy import is_this_machine

_KEEP_S = 2.0  # vLLM's server closes idle connections after 5 s, and a request that comes just then is lost
_ROUTE = "/inference/v1/generate"
_BUSY_OR_BROKEN = (408, 425, 429)  # and all from 500 on
_ABORTED = (b'"finish_reason":"abort"', b'"finish_reason": "abort"')


class ServerClient(EngineClient):
    """Connections to one server, kept open from request to request. To be made in the pool's event loop.

    Args:
        url: `http://host:port`.
        api_key: what the server was started with as `--api-key`.

    Raises:
        ConfigError: aiohttp is not installed.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError("engines by address need aiohttp: pip install 'moe-routing-replay[pool]'") from error
        self.name = base_url(url)
        self._failures = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
            headers=headers | {"Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
            trust_env=not is_this_machine(url),  # the proxy of the environment, as r3's control calls
        )

    def start(self, request: Request) -> asyncio.Future:
        return asyncio.get_running_loop().create_task(self._send(request))

    async def cause_of_death(self, timeout_s: float) -> str | None:
        import aiohttp

        try:
            async with self._session.get(f"{self.name}/health") as answer:
                return None if answer.status == 200 else f"its engine has died (status {answer.status} of /health)"
        except aiohttp.ClientConnectorError as error:
            return f"the server has gone ({words_of(error)})"
        except self._failures as error:
            if isinstance(error, asyncio.TimeoutError):
                raise
            return f"the connection failed ({words_of(error)})"

    async def close(self) -> None:
        await self._session.close()

    async def _send(self, request: Request) -> bytes:
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": request.sampling,
            "return_token_ids": True,
        }
        try:
            async with self._session.post(f"{self.name}{_ROUTE}", data=json.dumps(body)) as answer:
                status, content = answer.status, await answer.read()
        except self._failures as error:
            raise EngineFailedError(f"the connection failed: {words_of(error)}") from error
        if status == 200:
            if any(mark in content for mark in _ABORTED):
                raise RequestAbortedError
            return content
        said = f"status {status}: {content[:500].decode(errors='replace')}"
        if status >= 500 or status in _BUSY_OR_BROKEN:
            raise EngineFailedError(said)
        raise CaptureError(f"{self.name}{_ROUTE} refused a request ({said}){_remedy(status)}")


def _remedy(status: int) -> str:
    remedies: dict[int, str] = {
        404: ". The route needs a server started with r3.capture.server_args",
        401: ". Expected the server's api_key",
        403: ". Expected the server's api_key",
    }
    return remedies.get(status, "")
