"""Scores saved rollouts with a model on this machine: live, replayed, and replayed with rows shifted by a position.

N sampled tokens, D distributions.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r3.capture import Rollout, Rollouts
from r3.diagnostics import RoutingSums
from r3.errors import DiagnosticsError
from r3.explain.adjustments import Before
from r3.explain.distributions import Distribution, score_and_admit, signed_mass
from r3.replay import attach, record
from r3.routing import RolloutRouting, RoutingSpec
from r3.routing.types import replace_trusted


@dataclass(frozen=True, kw_only=True)
class ShiftedView:
    """One way to run a forward.

    Attributes:
        weights: index of the checkpoint: 0 is the model in question, the others are earlier ones.
        replayed: whether routing is replayed.
        rows: shift of the rows: position t replays the saved row of position t + rows.
    """

    weights: int = 0
    replayed: bool = False
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one checkpoint.

    Attributes:
        table: for each view, float32 `[D, N]`, nats, on the CPU.
        excluded: for each view, float32 `[D]`, the share of the tokens that a distribution does not keep.
        routing: agreement of live routing with the saved rows, by shift of the rows.
        masses: for each view that was asked for, float32 `[D', N]`: mass kept, negative where the token is excluded.
        vocabulary: V.
    """

    table: dict[ShiftedView, Tensor]
    masses: dict[ShiftedView, Tensor]
    excluded: dict[ShiftedView, Tensor]
    routing: dict[int, RoutingSums]
    vocabulary: int


def open_model(path: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the checkpoint's causal language model, with logits in float32 as in r3's trainer and engines.

    Raises:
        DiagnosticsError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except Exception as error:  # whatever a foreign folder makes the libraries raise
        reason = "\n".join(str(error).splitlines()[:4])
        raise DiagnosticsError(f"{path}: expected a checkpoint of a causal language model: {reason}") from error
    head = model.get_output_embeddings()
    if head is None:
        raise DiagnosticsError(
            f"{path}: {type(model).__name__} has no output embeddings: it gives no log-probabilities"
        )
    if not model.config.get_text_config().tie_word_embeddings:
        head.float()
    return model


def score_rollouts(
    path: str,
    rollouts: Rollouts,
    distributions: Callable[[int], Sequence[Distribution]],
    views: Sequence[ShiftedView],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens_at_once: int,
    excluding: Callable[[int], Sequence[Distribution]] = lambda vocabulary: (),
) -> Scores:
    """Log-probabilities of all sampled tokens of `rollouts`, in their order, in each view.

    The model is freed before this returns.

    Args:
        path: of the checkpoint.
        distributions: those to score with, given V.
        views: of this checkpoint.
        tokens_at_once: padded tokens in one forward.
        excluding: truncated distributions of which `masses` are wanted, given V.

    Raises:
        DiagnosticsError: not a checkpoint, token ids beyond its vocabulary, or routing of another shape.
        UnsupportedModelError: the model cannot replay routing.
    """
    model = open_model(path, dtype, device)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])  # pyrefly: ignore
    largest = max((max((*r.prompt_ids, *r.token_ids), default=0) for r in rollouts), default=0)
    if largest >= vocabulary:
        raise DiagnosticsError(
            f"{path}: its vocabulary has {vocabulary} tokens, the rollouts have token {largest}: they are of another "
            "model, or of another tokenizer"
        )
    if rollouts.spec is not None:
        _require_same_routing(path, attach(model).spec, rollouts.spec)
    chosen, excluded = distributions(vocabulary), excluding(vocabulary)
    parts: dict[ShiftedView, list[Tensor]] = {view: [] for view in views}
    masses: dict[ShiftedView, list[Tensor]] = {view: [] for view in views if excluded}
    outside = {view: torch.zeros(len(chosen)) for view in views}
    agreement: dict[int, list[RoutingSums]] = {view.rows: [] for view in views if view.replayed}
    for batch in _batches(rollouts, tokens_at_once):
        inputs = _Inputs.of(batch, rollouts.spec, device)
        for view in views:
            recorded = record(model) if agreement and not view.replayed else contextlib.nullcontext()
            with recorded as recorder:
                logits = inputs.logits(model, view)
            table, kept = score_and_admit(logits, inputs.labels, chosen, inputs.before)
            parts[view].append(table.cpu())
            outside[view] += (~kept).sum(1).cpu()
            if excluded:
                masses[view].append(signed_mass(logits, inputs.labels, excluded).cpu())
            if recorder is not None:
                for rows, sums in agreement.items():
                    sums.append(_agreement(recorder.routing, inputs.routing(rows)))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    empty = torch.empty(len(chosen), 0)
    tables = {view: torch.cat(batches, dim=1) if batches else empty for view, batches in parts.items()}
    return Scores(
        table=tables,
        excluded={view: count / max(1, tables[view].shape[1]) for view, count in outside.items()},
        masses={view: torch.cat(batches, dim=1) for view, batches in masses.items() if batches},
        routing={rows: sum(sums[1:], sums[0]) for rows, sums in agreement.items() if sums},
        vocabulary=vocabulary,
    )


def _require_same_routing(path: str, model: RoutingSpec, rollouts: RoutingSpec) -> None:
    missing = sorted(set(model.layer_ids) - set(rollouts.layer_ids))
    if missing or (model.top_k, model.num_experts) != (rollouts.top_k, rollouts.num_experts):
        raise DiagnosticsError(
            f"{path}: its routers choose {model.top_k} of {model.num_experts} experts in {len(model.layer_ids)} "
            f"layers, the rollouts have routing of {rollouts.top_k} of {rollouts.num_experts} experts"
            + (f", and none of decoder layers {missing}" if missing else "")
            + ": they are of another model"
        )


def _batches(rollouts: Rollouts, tokens_at_once: int) -> Iterator[list[Rollout]]:
    batch: list[Rollout] = []
    for rollout in rollouts:
        if batch and max(map(len, (*batch, rollout))) * (len(batch) + 1) > tokens_at_once:
            yield batch
            batch = []
        batch.append(rollout)
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """A right-padded batch on the device."""

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor  # in flattened `input_ids`: the position that predicts each sampled token
    labels: Tensor
    before: Before
    rows: RolloutRouting | None

    @classmethod
    def of(cls, batch: Sequence[Rollout], spec: RoutingSpec | None, device: torch.device) -> "_Inputs":
        length = max(map(len, batch))
        input_ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask, sampled = torch.zeros_like(input_ids), torch.zeros(len(batch), length, dtype=torch.bool)
        begins = torch.zeros_like(input_ids)
        for b, rollout in enumerate(batch):
            input_ids[b, : len(rollout)] = torch.tensor(rollout.prompt_ids + rollout.token_ids, dtype=torch.int64)
            mask[b, : len(rollout)] = 1
            sampled[b, len(rollout.prompt_ids) : len(rollout)] = scored(rollout)
            begins[b, len(rollout.prompt_ids) : len(rollout)] = len(rollout.prompt_ids) + _begins(rollout.response_mask)
        places = sampled.flatten().nonzero()[:, 0]
        return cls(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            places=(places - 1).to(device),
            labels=input_ids.flatten()[places].to(device),
            before=Before(
                input_ids=input_ids.to(device),
                row=(places // length).to(device),
                begin=begins.flatten()[places].to(device),
                end=(places % length).to(device),
            ),
            rows=None
            if spec is None
            else RolloutRouting.cat([_rows(rollout, spec) for rollout in batch], length=length),
        )

    def routing(self, rows: int) -> RolloutRouting:
        """The saved rows, shifted: position t has the row of position t + rows."""
        assert self.rows is not None
        if not rows:
            return self.rows
        kept = self.attention_mask.bool().cpu()
        kept[:, slice(-rows, None) if rows > 0 else slice(0, -rows)] = False
        ids, validity = self.rows.expert_ids.roll(-rows, 1), self.rows.validity.roll(-rows, 1)
        return replace_trusted(self.rows, ids, validity, weight_version=None).only(kept)

    @torch.no_grad()
    def logits(self, model: Any, view: ShiftedView) -> Tensor:
        """Float32 `[n, V]`, the logits for each sampled token. The head runs on these positions only."""
        head = model.get_output_embeddings()

        def needed(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0].flatten(0, 1)[self.places][None]
            return (hidden.to(next(module.parameters()).dtype), *args[1:])

        handle = head.register_forward_pre_hook(needed)
        replay = {"routed_experts": self.routing(view.rows)} if view.replayed else {}
        try:
            return (
                model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False, **replay)
                .logits[0]
                .float()
            )
        finally:
            handle.remove()


def _begins(sampled: Tensor) -> Tensor:
    """int64 `[G]`: where the run of sampled tokens of each token began, which its request sampled."""
    places = torch.arange(len(sampled))
    return torch.where(sampled, 0, places + 1).cummax(0).values if len(sampled) else places


def scored(rollout: Rollout) -> Tensor:
    """bool `[G]`: sampled tokens that another token precedes."""
    is_scored = rollout.response_mask.clone()
    if not rollout.prompt_ids and len(is_scored):
        is_scored[0] = False
    return is_scored


def _rows(rollout: Rollout, spec: RoutingSpec) -> RolloutRouting:
    """The rollout's routing on the CPU; all rows live if it has none."""
    return RolloutRouting.without_rows(spec, len(rollout)) if rollout.routing is None else rollout.routing.to("cpu")


def _agreement(live: RolloutRouting, saved: RolloutRouting) -> RoutingSums:
    saved = saved.layers(live.layer_ids)
    return RoutingSums.from_tensors(live.expert_ids, saved.expert_ids, saved.validity, layer_ids=live.layer_ids)
