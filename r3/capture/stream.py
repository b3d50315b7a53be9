"""Rollouts of an asynchronous engine, with the weight version under which each token came."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from r3.capture.collect import collect
from r3.capture.rollout import Rollouts
from r3.capture.weight_versions import stamp_versions
from r3.errors import CaptureError
from r3.routing import RoutingSpec


async def async_rollout(
    engine: Any,
    prompt: Any,
    sampling_params: Any,
    spec: RoutingSpec | None,
    *,
    request_id: str,
    version: Callable[[], int | None] | None = None,
) -> Rollouts:
    """Run one request of a `vllm.AsyncLLM` to its end, and collect its completions.

    A request that is aborted, here or by a pause of the engine, returns what was captured until then, with finish
    reason "abort".

    Args:
        engine: a `vllm.AsyncLLM`.
        prompt: as `AsyncLLM.generate` takes it.
        sampling_params: with `logprobs=0` or more, cumulative outputs (vLLM's default) and any `n`.
        spec: the routing that the trainer's model can replay (`Replay.spec`); None leaves routing out.
        request_id: unique among the running requests.
        version: returns the engine's weight version, such as `lambda: sync.version`. It is called at each output. An
            engine gives no output between the pause and the commit of a sync, so this is the version that sampled.

    Raises:
        CaptureError: as `collect`; or outputs that are not cumulative.
    """
    if sampling_params.output_kind.name != "CUMULATIVE":
        raise CaptureError(
            f"output_kind: expected CUMULATIVE, got {sampling_params.output_kind.name}: until vLLM 0.31 routing is "
            "lost where parts are added up, and the last output alone does not tell when its tokens came"
        )
    last: Any = None
    arrived: dict[int, int] = {}
    version_starts: dict[int, list[tuple[int, int]]] = {}
    async for output in engine.generate(prompt, sampling_params, request_id):
        now = None if version is None else version()
        for completion in output.outputs:
            before, arrived[completion.index] = arrived.get(completion.index, 0), len(completion.token_ids)
            boundaries = version_starts.setdefault(completion.index, [])
            if now is not None and (not boundaries or boundaries[-1][1] != now):
                boundaries.append((before, now))
        last = _joined(last, output)
    if last is None:
        raise CaptureError(f"request {request_id}: the engine ended it without an output")
    rollouts = collect([last], spec, prompt_start=sampling_params.routed_experts_prompt_start or 0)
    if version is None:
        return rollouts
    completions = [completion.index for completion in last.outputs]
    stamped = [
        stamp_versions(item, version_starts[index]) if version_starts[index] else item
        for item, index in zip(rollouts, completions, strict=True)
    ]
    return replace(rollouts, items=stamped)


def _joined(earlier: Any, output: Any) -> Any:
    """`output` with the completions that ended earlier: vLLM reports the end of each completion once."""
    if earlier is None:
        return output
    completions = {completion.index: completion for completion in (*earlier.outputs, *output.outputs)}
    output.outputs = [completions[index] for index in sorted(completions)]
    return output
