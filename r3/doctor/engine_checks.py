"""Checks of an engine in this process: its settings, by vLLM itself, its capture, and its agreement with the model."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from r3.capture import Endpoint, engine_kwargs, handshake, running_engine
from r3.config import R3Config
from r3.doctor.arrival import arrival
from r3.doctor.check import Check, guarded
from r3.doctor.engine_agreement import engine_agreement
from r3.doctor.sync_checks import sync_state
from r3.errors import summary
from r3.replay import Replay, attach
from r3.routing import RoutingSpec
from r3.weight_sync import WeightSync, engine_of


def engine_settings(config: R3Config) -> Check:
    """Run vLLM's own checks of the engine's settings: parallelism, executor, model runner, connectors."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_config: Any = EngineArgs(**engine_kwargs(config)).create_engine_config()
    parallel = vllm_config.parallel_config
    detail = (
        f"accepted by vLLM: tensor parallel {parallel.tensor_parallel_size}, executor "
        f"{parallel.distributed_executor_backend}, model runner "
        f"{'V2' if getattr(vllm_config, 'use_v2_model_runner', False) else 'V1'}"
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


def engine_checks(
    config: R3Config, spec: RoutingSpec | None, timeout_s: float, *, arrives: bool = False
) -> Iterator[Check]:
    """Start an engine of the settings, check its sync state, capture and agreement with the model, and stop it."""
    if spec is None:
        yield Check(
            name="engine",
            status="problem",
            detail="not started: no model that can be replayed",
            remedy="set trainer.policy.model.path (or --model) to the folder of one",
        )
        return
    with contextlib.ExitStack() as stack:
        started: list[Any] = []

        def start() -> Check:
            started.append(stack.enter_context(running_engine(config)))
            state = sync_state("engine", engine_of(started[0]), timeout_s)
            if state.status != "ok":
                return state
            captured = capture_check("engine", started[0], spec)
            return replace(captured, detail=f"{captured.detail}; {state.detail}")

        (engine_check,) = guarded("engine", start)
        yield engine_check
        if engine_check.status == "ok":
            yield from guarded("engine agreement", partial(agreement_check, "engine agreement", started[0], config))
        if engine_check.status == "ok" and arrives:
            yield from guarded("engine weights", partial(arrival_check, "engine weights", started[0], config))


def agreement_check(name: str, engine: Any, config: R3Config, server: Endpoint | None = None) -> Check:
    """Score the engine's samples with the model of the settings, loaded in the engine's dtype."""
    reach: dict[str, Any] = {} if server is None else {"timeout_s": server.timeout_s, "api_key": server.api_key}
    agreement = engine_agreement(engine, _replayed_model(config), **reach)
    accepted = config.trainer.diagnostics.accepted_engine_faults
    faults = agreement.faults()
    detail = (
        f"{agreement.family}, {agreement.tokens} sampled tokens: k3 {agreement.k3_replayed:.2g} replayed and "
        f"{agreement.k3_live:.2g} live, {100 * (agreement.differing_rows or 0):.1f}% of choices differ, "
        f"{agreement.repeat_nats:.2g} nats between two answers to the same prompt"
    )
    if not faults:
        return Check(name=name, status="ok", detail=detail)
    return Check(
        name=name,
        status="warning" if set(faults) <= set(accepted) else "problem",
        detail=f"{detail}:{summary(f'{fault}: {text}' for fault, text in faults.items())}",
        remedy="docs/reference/engines.md lists families; a run stops on it unless "
        "trainer.diagnostics.accepted_engine_faults="
        f"[{','.join(faults)}]",
    )


def arrival_check(name: str, engine: Any, config: R3Config) -> Check:
    """Check that each kind of weight of the settings' model arrives in the engine."""
    dtype = getattr(torch, config.generator.inference_engine.dtype)
    with contextlib.closing(WeightSync(engine, transport="files", dtype=dtype)) as sync:
        outcome = arrival(sync, engine, _replayed_model(config))
    untold = f"; too small a change to tell: {', '.join(outcome.untold)}" if outcome.untold else ""
    if not outcome.stale:
        return Check(
            name=name,
            status="ok",
            detail=f"{len(outcome.kinds)} kinds, none of them stale after its sync{untold}",
        )
    return Check(
        name=name,
        status="problem",
        detail=f"the engine goes on with old weights after a sync that commits, of {', '.join(outcome.stale)}{untold}",
        remedy="start a new engine for each version of such a model (docs/reference/weight-sync.md)",
    )


def _replayed_model(config: R3Config) -> Replay:
    """Load the model of the settings in the engine's dtype, on this machine, and attach replay."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.generator.inference_engine.dtype)
    return attach(AutoModelForCausalLM.from_pretrained(config.trainer.policy.model.path, dtype=dtype).to(device).eval())
