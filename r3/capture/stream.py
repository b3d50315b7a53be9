"""Rollouts of an asynchronous engine, with the weight version under which each token came."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from r3.capture.collect import collect
from r3.capture.rollout import Rollouts
from r3.capture.weight_versions import stamp_versions
from r3.errors import CaptureError
from r3.http import retry_waits_s
from r3.routing import RoutingSpec
from r3.vllm_compat.engines import rejections


async def async_rollout(
    engine: Any,
    prompt: Any,
    sampling_params: Any,
    spec: RoutingSpec | None,
    *,
    request_id: str,
    version: Callable[[], int | None] | None = None,
    paused_timeout_s: float = 600.0,
) -> Rollouts:
    """Run one request of a `vllm.AsyncLLM` to its end, and collect its completions.

    A request that is aborted, here or by a pause of the engine, returns what was captured until then, with finish
    reason "abort". One that a paused engine rejects begins anew until the engine takes it (vLLM 0.33 rejects where
    somebody paused it by `pause_generation`; r3's syncs let it queue).

    Args:
        engine: a `vllm.AsyncLLM`.
        prompt: as `AsyncLLM.generate` takes it.
        sampling_params: with `logprobs=0` or more, cumulative outputs (vLLM's default) and any `n`.
        spec: the routing that the trainer's model can replay (`Replay.spec`); None leaves routing out.
        request_id: unique among the running requests.
        version: returns the engine's weight version, such as `lambda: sync.version`. It is called at each output. An
            engine gives no output between the pause and the commit of a sync, so this is the version that sampled.
        paused_timeout_s: longest time for which a request that is rejected begins anew.

    Raises:
        CaptureError: as `collect`; outputs that are not cumulative; or an engine that is paused for longer.
    """
    if sampling_params.output_kind.name != "CUMULATIVE":
        raise CaptureError(
            f"output_kind: expected CUMULATIVE, got {sampling_params.output_kind.name}: until vLLM 0.31 routing is "
            "lost where parts are added up, and the last output alone does not tell when its tokens came"
        )
    outputs = await _accepted(
        lambda: _outputs(engine.generate(prompt, sampling_params, request_id), version), request_id, paused_timeout_s
    )
    if outputs.last is None:
        raise CaptureError(f"request {request_id}: the engine ended it without an output")
    rollouts = collect([outputs.last], spec, prompt_start=sampling_params.routed_experts_prompt_start or 0)
    if version is None:
        return rollouts
    starts = [outputs.version_starts[completion.index] for completion in outputs.last.outputs]
    stamped = [stamp_versions(item, start) if start else item for item, start in zip(rollouts, starts, strict=True)]
    return replace(rollouts, items=stamped)


@dataclass
class _Outputs:
    """What a request gave: its last output, with all completions, and each one's (first token, weight version)."""

    last: Any = None
    version_starts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


async def _outputs(generator: AsyncIterator[Any], version: Callable[[], int | None] | None) -> _Outputs:
    found = _Outputs()
    arrived: dict[int, int] = {}
    async for output in generator:
        now = None if version is None else version()
        for completion in output.outputs:
            before, arrived[completion.index] = arrived.get(completion.index, 0), len(completion.token_ids)
            boundaries = found.version_starts.setdefault(completion.index, [])
            if now is not None and (not boundaries or boundaries[-1][1] != now):
                boundaries.append((before, now))
        found.last = _joined(found.last, output)
    return found


async def _accepted(run: Callable[[], Awaitable[_Outputs]], request_id: str, timeout_s: float) -> _Outputs:
    """The result of the first `run` that the engine does not reject."""
    end = time.monotonic() + timeout_s
    waits_s = retry_waits_s()
    while True:
        try:
            return await run()
        except rejections() as error:
            wait_s = next(waits_s)
            if time.monotonic() + wait_s >= end:
                raise CaptureError(
                    f"request {request_id}: the engine rejected it for {timeout_s:g} s ({error}): it is paused. Resume "
                    "it, or give a longer paused_timeout_s"
                ) from error
        await asyncio.sleep(wait_s)


def _joined(earlier: Any, output: Any) -> Any:
    """`output` with the completions that ended earlier: vLLM reports the end of each completion once."""
    if earlier is None:
        return output
    completions = {completion.index: completion for completion in (*earlier.outputs, *output.outputs)}
    output.outputs = [completions[index] for index in sorted(completions)]
    return output
