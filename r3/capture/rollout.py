"""The results of capture: rollouts, and batches of them.

P tokens of the prompt, G tokens after it: sampled ones, and in a conversation those between its turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from r3.errors import CaptureError, summary
from r3.routing import RolloutRouting, RoutingSpec
from r3.routing.checks import require_same_rows
from r3.routing.types import replace_trusted
from r3.sampling_mask import SamplingMask


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """One sampled completion, or the joined turns of a conversation.

    Attributes:
        prompt_ids: P token ids.
        token_ids: G token ids.
        response_mask: bool `[G]`, True on tokens that the policy sampled.
        logprobs: float32 `[G]`, nats, under the engine's sampling distribution; 0 where `response_mask` is False.
        routing: `[1, P + G, L, K]`, not valid where no row was captured, as for the token that was sampled last. None
            if routing was not asked for.
        finish_reason: as vLLM gives it.
        prompt_index: which of the collected outputs it belongs to; the samples of one prompt share it.
        weight_versions: versions of the weights that took part, ascending; empty if unknown.
        row_versions: int32 `[P + G]`, the version that produced each row, -1 where unknown; None if no version is
            known.
        engine: name of the engine of a pool that sampled it; None if there is no pool.
        sampling_mask: `[P + G]`, the ids that each token was sampled from. None if all were sampled from the whole
            vocabulary, or nobody asked.

    Raises:
        CaptureError: parts whose lengths do not fit the tokens.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    response_mask: Tensor
    logprobs: Tensor
    routing: RolloutRouting | None
    finish_reason: str | None
    prompt_index: int = 0
    weight_versions: tuple[int, ...] = ()
    row_versions: Tensor | None = None
    engine: str | None = None
    sampling_mask: SamplingMask | None = None

    def __post_init__(self) -> None:
        generated, tokens = len(self.token_ids), len(self)
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            "response_mask": (self.response_mask, (generated,)),
            "logprobs": (self.logprobs, (generated,)),
            "row_versions": (self.row_versions, (tokens,)),
            "routing": (self.routing, (1, tokens)),
            "sampling_mask": (self.sampling_mask, (tokens,)),
        }
        problems = [
            f"{name}: expected {[*shape, *part.shape[2:]]}, got {list(part.shape)}"
            for name, (part, shape) in parts.items()
            if part is not None and tuple(part.shape[:2]) != shape
        ]
        if problems:
            raise CaptureError(
                f"a rollout of {len(self.prompt_ids)} prompt and {generated} generated tokens (prompt "
                f"{self.prompt_index}):{summary(problems)}\nRollout.truncate cuts all of them alike"
            )

    def __len__(self) -> int:
        """P + G."""
        return len(self.prompt_ids) + len(self.token_ids)

    def truncate(self, max_length: int | None = None, *, max_response_length: int | None = None) -> "Rollout":
        """The rollout as if sampling had ended at a length: tokens, mask, log-probabilities, rows and versions.

        A truncated rollout has finish reason "length", and its last token has no row, since nothing is sampled after
        it. Versions of which no token or row is left are dropped. A rollout that is short enough is returned unchanged.

        Args:
            max_length: most tokens, those of the prompt included.
            max_response_length: most tokens after the prompt.

        Raises:
            CaptureError: no limit, a negative one, or no room for a token after the prompt.
        """
        limits = {"max_length": max_length, "max_response_length": max_response_length}
        set_limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not set_limits or min(set_limits.values()) < 0:
            raise CaptureError(f"expected max_length or max_response_length from 0 up, got {limits}")
        prompt = len(self.prompt_ids)
        length = min(
            len(self), *(limit + (prompt if name != "max_length" else 0) for name, limit in set_limits.items())
        )
        if length == len(self):
            return self
        if length <= prompt:
            raise CaptureError(
                f"expected room for a token after the prompt of {prompt} tokens (prompt {self.prompt_index}), got "
                f"{' and '.join(f'{name}={limit}' for name, limit in set_limits.items())}: raise it, or leave "
                "the rollout out"
            )
        routing, rows, versions = self.routing, self.row_versions, self.weight_versions
        if rows is not None:
            versions_before, rows = set(rows.tolist()), rows[:length].clone()
            rows[-1] = -1
            # Without a prompt, the version of the first token is unknown.
            versions = (
                tuple(version for version in versions if version not in versions_before - set(rows.tolist()))
                or versions
            )
        if routing is not None:
            expert_ids, valid = routing.expert_ids[:, :length].clone(), routing.valid[:, :length].clone()
            expert_ids[:, -1], valid[:, -1] = 0, False
            version = versions[0] if len(versions) == 1 else routing.weight_version
            routing = replace_trusted(routing, expert_ids, valid, weight_version=version)
        return replace(
            self,
            token_ids=self.token_ids[: length - prompt],
            response_mask=self.response_mask[: length - prompt],
            logprobs=self.logprobs[: length - prompt],
            routing=routing,
            finish_reason="length",
            weight_versions=versions,
            row_versions=rows,
            sampling_mask=self.sampling_mask and self.sampling_mask.select(slice(length)),
        )

    @property
    def spans_versions(self) -> bool:
        """Whether more than one version took part, or a known version and rows of unknown version.

        False if no version is known. See `r3.capture.resolve_mixed_versions`.
        """
        if len(self.weight_versions) != 1 or self.row_versions is None:
            return len(self.weight_versions) > 1
        # Without routing, the tokens that were fed to the model: all but the last.
        row_versions = self.row_versions
        has_row = slice(len(self) - 1) if self.routing is None else self.routing.captured[0].to(row_versions.device)
        return bool((row_versions[has_row] < 0).any())

    @property
    def weight_version(self) -> int | None:
        """The one version of all its rows, or None."""
        return None if self.spans_versions or not self.weight_versions else self.weight_versions[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """Rollouts as right-padded tensors `[B, S]`, S the longest of them.

    Attributes:
        input_ids: int64, prompt and completion.
        attention_mask: int64, 1 on tokens, 0 on padding.
        response_mask: bool, True on sampled tokens.
        logprobs: float32, nats; entry t is of token t. 0 where `response_mask` is False.
        routing: `[B, S, L, K]`; not valid on the last token of each rollout and on padding. None if not captured.
        sampling_mask: `[B, S]`, the ids that each token was sampled from; None if they are the whole vocabulary.

    Raises:
        CaptureError: parts of other [B, S] than `input_ids`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    routing: RolloutRouting | None = None
    sampling_mask: SamplingMask | None = None

    def __post_init__(self) -> None:
        require_same_rows(tuple(self.input_ids.shape), vars(self), CaptureError)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RolloutBatch":
        """The same batch on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RolloutBatch":
        """The same batch in page-locked host memory, from which `to` a GPU runs beside computation."""
        return self._map(lambda part: part.pin_memory())

    def select(self, samples: slice | list[int]) -> "RolloutBatch":
        """The chosen rollouts; a slice shares memory."""
        return self._map(lambda part: part[samples] if isinstance(part, Tensor) else part.select(samples))

    def _map(self, change: Callable[[Any], Any]) -> "RolloutBatch":
        parts: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        return RolloutBatch(**{name: change(part) for name, part in parts.items() if part is not None})


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The result of `collect`: rollouts that share a routing spec.

    Attributes:
        items: the rollouts, in the order of the outputs and of their completions.
        spec: spec of their routing; None if none was asked for.
        failed: reason why a sample could not be used, by its index among the outputs: set by `collect(on_error="skip")`
            and `resolve_mixed_versions`.
        mixed_versions: how many rollouts span weight versions, as `resolve_mixed_versions` found them.
    """

    items: list[Rollout]
    spec: RoutingSpec | None
    failed: dict[int, str] = field(default_factory=dict)
    mixed_versions: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.items)

    def truncate(self, max_length: int | None = None, *, max_response_length: int | None = None) -> "Rollouts":
        """`Rollout.truncate` of each, to one length: `rollouts.truncate(4096).batch(pad_token_id)`.

        Raises:
            CaptureError: as `Rollout.truncate`, of the first whose prompt leaves no room.
        """
        items = [rollout.truncate(max_length, max_response_length=max_response_length) for rollout in self.items]
        return replace(self, items=items)

    def batch(self, pad_token_id: int, *, pin_memory: bool = False) -> RolloutBatch:
        """All rollouts as one right-padded batch; page-locked if `pin_memory`, without another copy of the routing.

        Raises:
            CaptureError: with a spec, rollouts without routing, or with that of other tokens; without one, any routing.
        """
        lengths = [len(rollout) for rollout in self.items]
        shape = (len(self.items), max(lengths))
        input_ids = torch.full(shape, pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        response_mask = torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        for b, (rollout, length) in enumerate(zip(self.items, lengths, strict=True)):
            prompt = len(rollout.prompt_ids)
            input_ids[b, :length] = torch.tensor(rollout.prompt_ids + rollout.token_ids)
            attention_mask[b, :length] = 1
            response_mask[b, prompt:length] = rollout.response_mask
            logprobs[b, prompt:length] = rollout.logprobs
        parts = self._routings()
        routing = RolloutRouting.cat(parts, length=shape[1], pin_memory=pin_memory) if parts else None
        batch = RolloutBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=response_mask,
            logprobs=logprobs,
            routing=routing,
            sampling_mask=self._sampling_mask(shape[1]),
        )
        return batch.pin_memory() if pin_memory else batch

    def _sampling_mask(self, length: int) -> SamplingMask | None:
        """`[B, length]`; None if no rollout has one."""
        parts = [rollout.sampling_mask for rollout in self.items]
        masks = [part for part in parts if part is not None]
        if masks and len(masks) < len(parts):
            raise CaptureError(
                f"sampling masks: expected one of each of {len(parts)} rollouts, or of none, got {len(masks)}: collect "
                "all of them with sampling_mask=True"
            )
        return SamplingMask.cat(masks, length) if masks else None

    def _routings(self) -> list[RolloutRouting]:
        """The routing of each rollout; none without a spec."""
        wrong = []
        for i, rollout in enumerate(self.items):
            part, expected = rollout.routing, self.spec and (1, len(rollout), len(self.spec.layer_ids), self.spec.top_k)
            if (part and part.shape) != expected:
                wrong.append(f"rollout {i}: expected {expected or 'none'}, got {part.shape if part else 'none'}")
        if wrong:
            raise CaptureError(
                f"routing of {len(wrong)} of {len(self.items)} rollouts does not fit the spec. Collect all with that "
                "spec. To have a rollout routed live, and counted as such, give it "
                "RolloutRouting.without_rows(spec, len(rollout)); where nothing is to be replayed, let the spec be "
                f"None:{summary(wrong)}"
            )
        return [rollout.routing for rollout in self.items if rollout.routing is not None]
