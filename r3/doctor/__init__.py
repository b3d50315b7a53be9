"""Checks of a machine, an environment, a model folder, a server and an engine, for whatever would stop a run.

Checks are independent: a failed one stops no other.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from r3.capture import Endpoint
from r3.config import R3Config
from r3.doctor.arrival import Arrival, KindArrival, arrival
from r3.doctor.check import Check, Status, guarded
from r3.doctor.engine_agreement import engine_agreement
from r3.doctor.engine_checks import agreement_check, engine_checks, engine_settings
from r3.doctor.machine import machine_checks
from r3.doctor.model_checks import generation_config, model, tokenizer
from r3.doctor.packages import ENVIRONMENT, optional_packages
from r3.doctor.server_checks import server_checks
from r3.doctor.settings_checks import run_settings
from r3.doctor.vllm_build import INSTALL_VLLM, vllm_build, vllm_builds, vllm_platform
from r3.doctor.weights import weights
from r3.routing import RoutingSpec

__all__ = [
    "ENVIRONMENT",
    "Arrival",
    "Check",
    "KindArrival",
    "Status",
    "arrival",
    "engine_agreement",
    "examine",
]


def examine(
    config: R3Config,
    *,
    url: str | None = None,
    engine: bool = False,
    sync: bool = False,
    agreement: bool = False,
    arrives: bool = False,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> Iterator[Check]:
    """Run all checks that apply, and yield each result as it is known.

    Args:
        config: settings. Without `trainer.policy.model.path`, nothing that needs a model is checked.
        url: of a server to check (`http://host:port`).
        engine: start an engine of the settings in this process, and check its capture and its outputs. Takes as long as
            an engine takes to start.
        sync: weights will be synced into the server: missing control routes are then a problem.
        agreement: score the server's samples with the model of the settings, on this machine. Both must have the same
            weights. An engine that is started here is always compared.
        arrives: sync each kind of weight alone into the engine that is started here (`engine`), and check that the
            engine's outputs change: twenty to forty syncs.
        timeout_s: timeout of each request to the server.
        api_key: key of the server, if it needs one.
    """
    for name, check in ENVIRONMENT.items():
        yield from guarded(name, check)
    yield from machine_checks(config)
    yield from optional_packages()
    installed = bool(vllm_builds())
    if not installed:
        yield Check(
            name="vllm",
            status="warning" if url else "problem",
            detail="not installed here: only a server elsewhere can sample",
            remedy=INSTALL_VLLM,
        )
    else:
        yield from guarded("vllm", vllm_build)
        yield from guarded("vllm platform", vllm_platform)
    yield from guarded("settings", partial(run_settings, config))
    path, spec = config.trainer.policy.model.path, None
    if path:
        specs: list[RoutingSpec] = []
        yield from guarded("model", partial(model, Path(path), specs))
        spec = specs[0] if specs else None
        yield from guarded("weights", partial(weights, Path(path)))
        yield from guarded("tokenizer", partial(tokenizer, Path(path)))
        yield from guarded("generation config", partial(generation_config, Path(path)))
        if installed:
            yield from guarded("engine settings", partial(engine_settings, config))
    if url is not None:
        server = Endpoint(url=url, timeout_s=timeout_s, api_key=api_key)
        yield from server_checks(server, spec, sync=sync)
        if agreement and spec is not None:
            compared = partial(agreement_check, "server agreement", server.base, config, server)
            yield from guarded("server agreement", compared)
    if engine:
        yield from engine_checks(config, spec, timeout_s, arrives=arrives)
