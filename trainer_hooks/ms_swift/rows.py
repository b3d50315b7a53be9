"""The engine's rows on swift's samples, and their place in the micro-batches that swift collates of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from swift.rl_core.data import GRPOSample
from torch import Tensor

from r3.capture import SamplingMask
from r3.capture.kept_ids import KeptIds
from r3.capture.rows import checked_rows, row_array
from r3.errors import CaptureError
from r3.replay.context import KEYWORD
from r3.routing import RolloutRouting, RoutingSpec
from trainer_hooks.ms_swift.engine import SETS

Read = TypeVar("Read")


@dataclass
class RoutedSample(GRPOSample):
    """swift's sample, with the tokens that its rows are of.

    Attributes:
        engine_tokens: P + G token ids that the engine read and sampled; empty before the rollout.
        engine_rows: integer `[P + G - 1, decoder layers, K]` as the engine gave it. swift's own `routed_experts` stays
            None: it would be padded, widened to int64 and moved to the GPU for nothing.
        engine_sets: what each of the G sampled tokens was sampled from; None for the whole vocabulary.
    """

    engine_tokens: Sequence[int] = ()
    engine_rows: Any = None
    engine_sets: KeptIds | None = None

    def apply_rollout_output(self, *, rollout_output: Any) -> None:
        super().apply_rollout_output(rollout_output=rollout_output)
        response = rollout_output.response
        choice = response.choices[0]
        self.engine_tokens = [*(response.prompt_token_ids or ()), *(choice.token_ids or ())]
        self.engine_rows, self.routed_experts = choice.routed_experts, None
        self.engine_sets = getattr(choice, SETS, None)

    def routing(self, spec: RoutingSpec) -> RolloutRouting:
        """`[1, P + G, L, K]`, checked; the token that was sampled last has no row.

        Raises:
            CaptureError: no rows, or rows that cannot be right.
        """
        complete = self.finish_reason != "abort"
        return checked_rows(row_array(self.engine_rows), spec, tokens=len(self.engine_tokens), complete=complete)

    def sampling_mask(self) -> SamplingMask | None:
        """`[P + G]`, checked; None for the whole vocabulary.

        Raises:
            CaptureError: a set without its own token, or of another number of tokens.
        """
        if self.engine_sets is None:
            return None
        prompt = len(self.engine_tokens) - len(self.engine_sets.sizes)
        return SamplingMask.of(*self.engine_sets, self.engine_tokens[prompt:], first=prompt)


@dataclass(frozen=True)
class PlacedRows:
    """What the rollouts decided for a micro-batch `[B, S]`, or `[1, N]`.

    Attributes:
        routing: int16 or int32 `[B, S, L, K]`, with -1 where there is no row.
        sampling_mask: `[B, S]`, the ids that each token was sampled from; None for the whole vocabulary.
        captured: share of the samples' tokens that have a row.
    """

    routing: Tensor
    sampling_mask: SamplingMask | None
    captured: float


def placed(
    samples: Sequence[RoutedSample], spec: RoutingSpec, input_ids: Tensor, *, packed: bool = False, left: bool = False
) -> PlacedRows:
    """What was captured, where swift has put the tokens of the samples of a micro-batch.

    By place and not by attention mask. The tokens are compared with the engine's, and with those in that place.

    Args:
        samples: encoded, in the order of the micro-batch.
        spec: of the model.
        input_ids: `[B, S]` with one row a sample, or `[1, N]` with one after another.
        packed: which of these (`padding_free`).
        left: whether rows are padded on the left.

    Raises:
        CaptureError: rows that cannot be right, or other tokens than the engine's; names the sample.
    """
    ids = input_ids.cpu()
    dtype = torch.int16 if spec.num_experts <= 1 << 15 else torch.int32  # unlike uint8, these have a -1
    target = torch.full((*ids.shape, len(spec.layer_ids), spec.top_k), -1, dtype=dtype)
    sizes = torch.zeros(ids.shape, dtype=torch.int64)
    sets: list[Tensor] = []
    captured = before = 0
    for number, sample in enumerate(samples):
        encoded = list(sample.encoded["input_ids"])
        row = 0 if packed else number
        start = before if packed else (ids.shape[1] - len(encoded) if left else 0)
        before += len(encoded)
        _require_there(ids, encoded, number, row, start)
        routing = _routing(sample, encoded, number, spec)
        captured += routing.rows_valid
        valid = routing.validity[0].reshape(len(sample.engine_tokens), -1)[..., None]
        rows = routing.expert_ids[0].to(dtype).masked_fill(~valid, -1)
        target[row, start : start + len(rows)] = rows
        if (mask := _checked(sample.sampling_mask, number)) is not None:
            sizes[row, start : start + len(mask.sizes)] = mask.sizes
            sets.append(mask.token_ids)
    if sets and len(sets) < len(samples):
        raise CaptureError(f"sets: expected those of all {len(samples)} samples, or of none, got {len(sets)}")
    return PlacedRows(target, SamplingMask(sizes, torch.cat(sets)) if sets else None, captured / max(1, before))


def _require_there(ids: Tensor, encoded: list[int], number: int, row: int, start: int) -> None:
    there = ids[row : row + 1, max(0, start) : start + len(encoded)].flatten().tolist()
    if there != encoded:
        raise CaptureError(
            f"sample {number}: expected its {len(encoded)} tokens from position {start} of row {row} of a micro-batch "
            f"{list(ids.shape)} on, got others: swift lays its micro-batches out in another way than r3's hook knows"
        )


def _routing(sample: RoutedSample, encoded: list[int], number: int, spec: RoutingSpec) -> RolloutRouting:
    tokens = list(sample.engine_tokens)
    # What the template adds behind the completion has no row; it is routed live, and is in no loss.
    if encoded[: len(tokens)] != tokens:
        same = next((i for i, (a, b) in enumerate(zip(encoded, tokens, strict=False)) if a != b), len(encoded))
        raise CaptureError(
            f"sample {number}: expected the {len(tokens)} tokens that the engine read and sampled, got {len(encoded)} "
            f"of which those from {same} on are others. swift encodes samples anew for training: leave out what makes "
            "the result another (truncation of prompts, a scheduler that rewrites earlier turns, teacher_prompt)"
        )
    return _checked(lambda: sample.routing(spec), number)


def _checked(read: Callable[[], Read], number: int) -> Read:
    try:
        return read()
    except CaptureError as error:
        raise CaptureError(f"sample {number}: {error}") from error


def without_rows(model_inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward that is meant to be live."""
    return {name: value for name, value in model_inputs.items() if name != KEYWORD}
