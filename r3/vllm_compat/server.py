"""Differences between releases of vLLM in its HTTP server."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from r3.errors import ConfigError
from r3.vllm_compat.capture import routing_survives_merging

# Newest first: older places warn that they will go.
ARGUMENTS = (
    "vllm.entrypoints.common.cli_args",  # from 0.33
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)
MAIN = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
)


def server_settings() -> frozenset[str]:
    """Names of the settings of vLLM's HTTP server beside the engine's.

    Raises:
        ConfigError: as `first_module`.
    """
    return frozenset(field.name for field in fields(importlib.import_module(first_module(ARGUMENTS)).FrontendArgs))


def server_module() -> str:
    """The module that runs the server as `python -m`.

    Raises:
        ConfigError: as `first_module`.
    """
    return first_module(MAIN)


def first_module(names: tuple[str, ...]) -> str:
    """The first of these modules that the installed vLLM has.

    Raises:
        ConfigError: it has none, or is not installed.
    """
    for name in names:
        with suppress(ModuleNotFoundError):  # of a package on the way to it
            if find_spec(name) is not None:
                return name
    raise ConfigError(f"the installed vLLM has none of the modules {', '.join(names)}: r3 does not know this release")


@contextmanager
def pauses_queue_requests() -> Iterator[None]:
    """Context in which `AsyncLLM.pause_generation` lets requests queue in every mode, as it does up to 0.32.

    From 0.33 the engine rejects them except in mode "keep". Its scheduler's own pause still queues.
    """
    from vllm.v1.engine.core_client import AsyncMPClient

    pause = getattr(AsyncMPClient, "pause_generation_async", None)
    if pause is None:
        yield
        return
    AsyncMPClient.pause_generation_async = AsyncMPClient.pause_scheduler_async
    try:
        yield
    finally:
        AsyncMPClient.pause_generation_async = pause


class KeepsRollouts:
    """ASGI middleware for `vllm serve --middleware`: for as long as the server runs, streams keep their routing, and
    requests wait while the server is paused.

    Without it, from 0.33, they are answered with status 503 except in mode "keep", and streams with status 200 and an
    error within, which clients do not send again.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        with routing_survives_merging(), pauses_queue_requests():
            await self.app(scope, receive, send)
