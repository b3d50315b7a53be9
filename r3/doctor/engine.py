"""Checks of an engine: of its settings, by vLLM itself, and of its capture, in this process."""

from dataclasses import replace
from typing import Any

from r3.capture import Endpoint, engine_kwargs, handshake, running_engine
from r3.config import R3Config
from r3.doctor.check import Check
from r3.doctor.sync import sync_state
from r3.routing import RoutingSpec
from r3.weight_sync import engine_of


def engine_settings(config: R3Config) -> Check:
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


def capture_check(name: str, engine: Any, spec: RoutingSpec, server: Endpoint | None = None) -> Check:
    reach: dict[str, Any] = {} if server is None else {"timeout_s": server.timeout_s, "api_key": server.api_key}
    done = handshake(engine, spec, **reach)
    detail = (
        f"{done.rows} rows of {done.layers} layers, {done.sampled_tokens} sampled tokens with log-probabilities, all "
        f"as the trainer needs them, in {done.seconds:.1f} s"
    )
    return Check(name=name, status="ok", detail=detail)


def engine(config: R3Config, spec: RoutingSpec | None, timeout_s: float) -> Check:
    if spec is None:
        return Check(
            name="engine",
            status="problem",
            detail="not started: no model that can be replayed",
            remedy="set trainer.policy.model.path (or --model) to the folder of one",
        )
    with running_engine(config) as running:
        state = sync_state("engine", engine_of(running), timeout_s)
        if state.status != "ok":
            return state
        captured = capture_check("engine", running, spec)
        return replace(captured, detail=f"{captured.detail}; {state.detail}")
