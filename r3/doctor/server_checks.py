"""Checks of a server: its answers, its version and routes, its capture, and the state of its weights."""

from collections.abc import Iterator
from functools import partial

from r3.capture import Endpoint
from r3.doctor.check import Check, guarded
from r3.doctor.engine_checks import capture_check
from r3.doctor.sync_checks import sync_state
from r3.doctor.vllm_build import vllm_version
from r3.proxy import no_proxy_for, proxy_of, proxy_of_others
from r3.routing import RoutingSpec
from r3.weight_sync import engine_of


def server_checks(server: Endpoint, spec: RoutingSpec | None, *, sync: bool) -> Iterator[Check]:
    """Run all checks of a server; those after the first only if it answers.

    Args:
        server: the server to check.
        spec: routing spec of the trainer's model; without it, capture is not checked.
        sync: whether weights will be synced into it; if they cannot, that is a problem.
    """
    yield from guarded("server proxy", partial(_proxy, server))
    (health,) = guarded("server", partial(_health, server))
    yield health
    if health.status == "problem":
        return
    yield from guarded("server version", lambda: vllm_version("server version", server.version()))
    controls: list[bool] = []
    yield from guarded("server routes", partial(_routes, server, controls))
    if sync or any(controls):
        yield from guarded("server sync", partial(_sync, server))
    if spec is None:
        yield Check(
            name="server capture",
            status="warning",
            detail="not checked: what its model's routing must look like is not known",
            remedy="give the folder of the same model with --model",
        )
        return
    yield from guarded("server capture", partial(capture_check, "server capture", server.base, spec, server))


def _proxy(server: Endpoint) -> Check | None:
    """Warn of a proxy of the environment between r3 and the server; no result if there is none."""
    between, others = proxy_of(server.base), proxy_of_others(server.base)
    if between is not None:
        detail = f"requests to {server.base} go through {between}: rollouts, routing and weight syncs alike"
    elif others is not None:
        detail = (
            f"r3 asks {server.base} directly, but other clients that read the environment (OpenAI's, requests, curl) "
            f"go through {others}"
        )
    else:
        return None
    return Check(name="server proxy", status="warning", detail=detail, remedy=no_proxy_for(server.base))


def _health(server: Endpoint) -> Check:
    server.ask("/health")
    return Check(name="server", status="ok", detail=f"{server.base} serves {server.model()}")


def _routes(server: Endpoint, controls: list[bool]) -> Check:
    """Check the server's routes; adds to `controls` whether it has the control routes."""
    paths = set(server.ask("/openapi.json")["paths"])
    controls.append("/collective_rpc" in paths)
    lacking = []
    if "/inference/v1/generate" not in paths:
        lacking.append("no token-in/token-out route (start it with --enable-scale-out)")
    if "/collective_rpc" not in paths:
        lacking.append("no control routes, so that no weights can be synced over HTTP (VLLM_SERVER_DEV_MODE=1)")
    return Check(
        name="server routes",
        status="warning" if lacking else "ok",
        detail="; ".join(lacking) or "token-in/token-out and control routes are there",
        remedy="start the server so, if you need them" if lacking else "",
    )


def _sync(server: Endpoint) -> Check:
    engine = engine_of(server.base, api_key=server.api_key)
    return sync_state("server sync", engine, server.timeout_s)
