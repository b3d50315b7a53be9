"""vLLM outputs -> rollouts with token ids, log-probabilities and checked routing.

P prompt tokens, G generated tokens. vLLM returns P + G - 1 rows: the token that was sampled last was never fed back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r3.errors import CaptureError, RoutingError, summary
from r3.routing import RolloutRouting, RoutingSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt_ids: P token ids.
        token_ids: G token ids.
        logprobs: float32 `[G]`, nats, of the sampled tokens under the engine's sampling distribution.
        routing: `[1, P + G - 1, L, K]`, the experts of each token but the last; None if not captured.
        finish_reason: as vLLM gives it.
        prompt_index: which of the collected outputs it belongs to; the samples of one prompt share it.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: Tensor
    routing: RolloutRouting | None
    finish_reason: str | None
    prompt_index: int


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """Rollouts as right-padded tensors `[B, S]`, S the longest of them.

    Attributes:
        input_ids: int64, prompt and completion.
        attention_mask: int64, 1 on tokens, 0 on padding.
        response_mask: bool, True on generated tokens.
        logprobs: float32, nats; entry t is of token t. 0 where `response_mask` is False.
        routing: `[B, S, L, K]`; not valid on the last token of each rollout and on padding. None if not captured.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    routing: RolloutRouting | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RolloutBatch":
        """The same batch on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RolloutBatch":
        """The same batch in page-locked host memory, from which `to` a GPU runs beside computation."""
        return self._map(lambda part: part.pin_memory())

    def select(self, samples: slice) -> "RolloutBatch":
        """Some of its rollouts; shares memory."""
        return self._map(lambda part: part.select(samples) if isinstance(part, RolloutRouting) else part[samples])

    def _map(self, change: Callable[[Any], Any]) -> "RolloutBatch":
        parts: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        return RolloutBatch(**{name: change(part) for name, part in parts.items() if part is not None})


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What `collect` returns: rollouts that share a routing spec and a weight version.

    Attributes:
        items: the rollouts, in the order of the outputs and of their completions.
        spec: the routing they carry; None if none was asked for.
        weight_version: the version that the engine sampled with, where the caller told.
    """

    items: list[Rollout]
    spec: RoutingSpec | None
    weight_version: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, pad_token_id: int, *, pin_memory: bool = False) -> RolloutBatch:
        """All rollouts as one right-padded batch; page-locked if `pin_memory`, its routing without a copy more."""
        lengths = [len(r.prompt_ids) + len(r.token_ids) for r in self.items]
        shape = (len(self.items), max(lengths))
        input_ids = torch.full(shape, pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        response_mask = torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        for b, (rollout, length) in enumerate(zip(self.items, lengths, strict=True)):
            prompt = len(rollout.prompt_ids)
            input_ids[b, :length] = torch.tensor(rollout.prompt_ids + rollout.token_ids)
            attention_mask[b, :length] = 1
            response_mask[b, prompt:length] = True
            logprobs[b, prompt:length] = rollout.logprobs
        routing = None
        if self.spec is not None:
            parts = [rollout.routing for rollout in self.items if rollout.routing is not None]
            routing = RolloutRouting.cat(parts, length=shape[1], pin_memory=pin_memory)
        batch = RolloutBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=response_mask,
            logprobs=logprobs,
            routing=routing,
        )
        return batch.pin_memory() if pin_memory else batch


def collect(outputs: Sequence[Any], spec: RoutingSpec | None, *, weight_version: int | None = None) -> Rollouts:
    """Turn vLLM's outputs into rollouts, or say which of them were not captured rightly.

    Args:
        outputs: `RequestOutput`s of `LLM.generate`, with `SamplingParams(logprobs=0)` or more.
        spec: the routing that the trainer's model can replay (`Replay.spec`): the outputs tell neither the number of
            experts nor a dense layer from a layer that always chose expert 0. None leaves routing out.
        weight_version: the version that the engine sampled with.

    Raises:
        CaptureError: no routing, a wrong number of rows, layers or slots, a layer that was never captured, expert ids
            out of range or repeated in a row, or no log-probabilities. Names the samples.
    """
    items, problems = [], []
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            where = f"sample {len(items) + len(problems)} (prompt {index}, completion {completion.index})"
            try:
                items.append(_rollout(output, completion, index, spec, weight_version))
            except CaptureError as error:
                problems.append(f"{where}: {error}")
    if problems:
        raise CaptureError(f"{len(problems)} of {len(items) + len(problems)} samples:{summary(problems)}")
    if not items:
        raise CaptureError("outputs: expected at least one completion, got none")
    return Rollouts(items, spec, weight_version)


def _rollout(output: Any, completion: Any, index: int, spec: RoutingSpec | None, weight_version: int | None) -> Rollout:
    prompt_ids, token_ids = list(output.prompt_token_ids), list(completion.token_ids)
    expected_rows = len(prompt_ids) + len(token_ids) - 1
    if completion.logprobs is None:
        raise CaptureError("no log-probabilities: ask for them with SamplingParams(logprobs=0)")
    logprobs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
    return Rollout(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        routing=None if spec is None else checked_rows(completion.routed_experts, expected_rows, spec, weight_version),
        finish_reason=completion.finish_reason,
        prompt_index=index,
    )


def checked_rows(
    routed_experts: np.ndarray | None, expected_rows: int, spec: RoutingSpec, weight_version: int | None = None
) -> RolloutRouting:
    """`[1, R, L, K]` of the layers that have a router, from vLLM's `[R, decoder layers, K]`.

    Raises:
        CaptureError: what is wrong with the array, at which position and decoder layer.
    """
    if routed_experts is None:
        raise CaptureError(
            "no routing: the engine does not return it. Start it with enable_return_routed_experts=True "
            "(r3.capture.engine_kwargs does)"
        )
    expected = (expected_rows, spec.num_layers, spec.top_k)
    if routed_experts.shape != expected or not np.issubdtype(routed_experts.dtype, np.integer):
        raise CaptureError(
            f"expected integer routing [prompt + generated - 1, decoder layers, top_k] = {expected}, got "
            f"{routed_experts.dtype} {routed_experts.shape}"
        )
    never = [layer for layer in spec.layer_ids if expected_rows and not routed_experts[:, layer].any()]
    if never and spec.top_k > 1:
        raise CaptureError(
            f"decoder layers {never} were never captured (all expert ids are 0). vLLM's CPU build 0.30 does this when "
            "it compiles: use enforce_eager=True; so do monolithic MoE kernels"
        )
    dense = sorted(set(range(spec.num_layers)) - {*spec.layer_ids, *spec.table_layers})
    routed = [layer for layer in dense if routed_experts[:, layer].any()]
    if routed:
        raise CaptureError(f"decoder layers {routed} are routed in the engine, but have no router in the trainer")
    rows = routed_experts[:, list(spec.layer_ids)]
    # int32 holds every dtype that vLLM uses; torch cannot sort its uint16.
    expert_ids = torch.from_numpy(rows.astype(np.int32))[None]
    valid = torch.ones(1, expected_rows, dtype=torch.bool)
    try:
        return RolloutRouting(expert_ids, valid, spec.layer_ids, spec.num_experts, weight_version)
    except RoutingError as error:
        raise CaptureError(str(error)) from error
