"""Joins the turns of a conversation into one rollout: sampled tokens, the tokens between them, and each token's row.

The row of the token that a turn sampled last exists only in the prefill of the next turn, which also has those of tool
and template tokens. It may also repeat rows of earlier tokens, recomputed or from the prefix cache.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from r3.capture.rollout import Rollout
from r3.capture.turns import drift, ids_of, kept_length, require_continued, require_joinable, shared_length
from r3.errors import CaptureError
from r3.routing import RolloutRouting
from r3.routing.types import replace_trusted
from r3.routing.validity import in_one_form
from r3.sampling_mask import SamplingMask

Overlap = Literal["earlier", "later"]


def stitch(turns: Sequence[Rollout], *, overlap: Overlap = "earlier", trim: int = 0) -> Rollout:
    """Join the turns of one conversation; each turn's prompt is the whole conversation before it, as token ids.

    Args:
        turns: in order, as `collect` made them; some may themselves be joined turns. A turn that ended early, or was
            asked with `routed_experts_prompt_start`, has fewer rows; turns missing at the end are no obstacle.
        overlap: whose row a token gets that several turns captured. The "earlier" one is that under which the
            log-probability after it was computed; the "later" one that which the last turn attended to. See
            `compare_overlap` for how often they differ. A row that lacks some layers is taken where none is whole.
        trim: how many tokens that a turn sampled last the next prompt may lack: chat templates drop end tokens, for
            one. They are not in the joined rollout, and so not trained on.

    Returns:
        The first turn's prompt, then all tokens after it: `response_mask` is True on sampled ones. A token that no
        turn captured has no valid row, and version -1. `finish_reason` is the last turn's, `prompt_index` the first's.
        A turn that an abort ended before it gave a token or a row took no part: its versions are left out.

    Raises:
        CaptureError: a prompt that does not begin with the turn before it, and where they diverge (`stitch_runs` joins
            the turns that continue each other); turns with and without routing, or of different layers, slots or
            experts.

    Example:
        >>> sampled = {"response_mask": torch.tensor([True]), "logprobs": torch.tensor([-0.5])}
        >>> first = Rollout(prompt_ids=[1, 2], token_ids=[3], routing=None, finish_reason="stop", **sampled)
        >>> second = Rollout(prompt_ids=[1, 2, 3, 4], token_ids=[5], routing=None, finish_reason="stop", **sampled)
        >>> stitch([first, second]).response_mask  # 3 and 5 were sampled, 4 came between the turns
        tensor([ True, False,  True])
    """
    _require_options(overlap, trim)
    require_joinable(turns)
    require_continued(turns, trim)
    return _joined(turns, [], overlap)


def stitch_runs(turns: Sequence[Rollout], *, overlap: Overlap = "earlier", trim: int = 0) -> list[Rollout]:
    """`stitch` for conversations whose prompts drift: one rollout per longest run of turns that continue each other.

    Each sampled token is in exactly one of them as sampled, unless it is trimmed: a prompt that lost or changed other
    tokens of earlier turns begins a new run, and is its prompt. Rows up to the first changed token also come from turns
    before the run.

    Raises:
        CaptureError: as `stitch`, except for drift.
    """
    _require_options(overlap, trim)
    require_joinable(turns)
    starts = [i for i in range(1, len(turns)) if drift(turns[i - 1], turns[i], trim) is not None]
    return [_joined(turns[a:b], turns[:a], overlap) for a, b in pairwise([0, *starts, len(turns)])]


def next_prompt_start(turns: Rollout | Sequence[Rollout], prompt_ids: Sequence[int] | None = None) -> int:
    """`SamplingParams.routed_experts_prompt_start` of the next turn: how many leading tokens have a row already.

    With it each row travels once, n rows for n tokens; without it every turn brings the rows of the whole
    conversation again.

    Below the next prompt's length, as vLLM needs: that prompt holds all tokens so far, and the last of them, never fed
    back, has no row yet.

    Args:
        turns: all turns so far, or what `stitch` made of them. None so far gives 0.
        prompt_ids: the next turn's prompt, where it need not begin with all tokens so far. Rows from the first token
            that changed are then asked for again.

    Raises:
        CaptureError: turns without routing.

    Example:
        >>> next_prompt_start([])
        0
    """
    turns = [turns] if isinstance(turns, Rollout) else turns
    if not turns:
        return 0
    target = ids_of(turns[-1]) if prompt_ids is None else list(prompt_ids)
    held = torch.zeros(len(target), dtype=torch.bool)
    for number, turn in enumerate(turns):
        if turn.routing is None:
            raise CaptureError(f"turn {number} has no routing: there is no row to start after")
        shared = shared_length(ids_of(turn), target)
        held[:shared] |= turn.routing.valid[0, :shared].cpu()
    leading = int(held.long().cumprod(0).sum())
    return max(0, min(leading, len(target) - 1))


class _Source(NamedTuple):
    """A turn, and how many of its leading tokens are those of the joined rollout."""

    turn: Rollout
    shared: int


class _Piece(NamedTuple):
    """Tokens `begin` to `end` of the joined rollout, whose rows come from one turn; from none if `turn` is None."""

    turn: Rollout | None
    begin: int
    end: int


def _joined(run: Sequence[Rollout], before: Sequence[Rollout], overlap: Overlap) -> Rollout:
    """One rollout of the turns of `run`. Missing rows come from turns in `before` with the same tokens up to there."""
    ids, prompt = ids_of(run[-1]), len(run[0].prompt_ids)
    sources = [_Source(turn, shared_length(ids_of(turn), ids)) for turn in before]
    kept = [_Source(turn, kept_length(turn, after)) for turn, after in pairwise(run)] + [_Source(run[-1], len(ids))]
    pieces = _pieces([*sources, *(kept if overlap == "later" else reversed(kept))], len(ids))
    took_part = [*(piece.turn for piece in pieces if piece.turn is not None), *filter(_took_part, run)]
    has_versions = any(turn.row_versions is not None for turn in (*took_part, *run))

    response_mask = torch.zeros(len(ids) - prompt, dtype=torch.bool)
    logprobs = torch.zeros(len(ids) - prompt)
    for turn, end in kept:
        begin = len(turn.prompt_ids)
        response_mask[begin - prompt : end - prompt] = turn.response_mask[: end - begin]
        logprobs[begin - prompt : end - prompt] = turn.logprobs[: end - begin]
    return Rollout(
        prompt_ids=list(run[0].prompt_ids),
        token_ids=ids[prompt:],
        response_mask=response_mask,
        logprobs=logprobs,
        routing=_joined_rows(pieces, like=run[0].routing),
        finish_reason=run[-1].finish_reason,
        prompt_index=run[0].prompt_index,
        weight_versions=tuple(sorted({version for turn in took_part for version in turn.weight_versions})),
        row_versions=_joined_versions(pieces) if has_versions else None,
        sampling_mask=_joined_sets(kept, len(ids)),
    )


def _joined_sets(kept: Sequence[_Source], length: int) -> SamplingMask | None:
    """`[S]`, of the tokens that each turn sampled; None if no turn has any.

    Raises:
        CaptureError: turns with and without.
    """
    masks = [source.turn.sampling_mask for source in kept]
    told = [mask for mask in masks if mask is not None]
    if not told:
        return None
    if len(told) < len(masks):
        raise CaptureError(
            f"sampling masks: expected one of each turn, or of none, got {len(told)} of {len(masks)} turns: collect "
            "all of them with sampling_mask=True"
        )
    everything = SamplingMask(torch.cat([mask.sizes for mask in told]), torch.cat([mask.token_ids for mask in told]))
    positions = torch.full((length,), -1)
    start = 0
    for (turn, end), mask in zip(kept, told, strict=True):
        begin = len(turn.prompt_ids)
        positions[begin:end] = torch.arange(start + begin, start + end)
        start += len(mask.sizes)
    return everything.take(positions)


def _pieces(sources: Sequence[_Source], length: int) -> list[_Piece]:
    """The source of the row of each of `length` tokens: the last turn that has it in every layer, or else the last that
    has it in some."""
    owner = torch.full((length,), -1)
    for has in ("captured", "valid"):
        for i, (turn, shared) in enumerate(sources):
            if turn.routing is not None:
                owner[:shared].masked_fill_(getattr(turn.routing, has)[0, :shared].cpu(), i)
            else:
                # No rows, but versions: of the tokens that were fed to the model, all but the last. How far a turn came
                # that sampled nothing is unknown, and does not matter.
                fed = min(shared, len(turn) - 1) if _took_part(turn) else 0
                versioned = slice(fed) if turn.row_versions is None else (turn.row_versions[:fed] >= 0).nonzero()[:, 0]
                owner[versioned] = i
    owners, counts = owner.unique_consecutive(return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]
    turns = [sources[i].turn if i >= 0 else None for i in owners.tolist()]
    return [_Piece(turn, begin, end) for turn, (begin, end) in zip(turns, pairwise(bounds), strict=True)]


def _joined_rows(pieces: Sequence[_Piece], like: RolloutRouting | None) -> RolloutRouting | None:
    """`[1, S, L, K]`; each row is written once."""
    if like is None:
        return None
    length = pieces[-1].end
    parts = [None if turn is None else turn.routing for turn, _, _ in pieces]
    forms = iter(in_one_form([rows.validity for rows in parts if rows is not None]))
    layers = like.shape[2:3] if any(rows is not None and rows.validity.dim() == 3 for rows in parts) else ()
    expert_ids = like.expert_ids.new_empty(1, length, *like.shape[2:])
    validity = like.validity.new_empty(1, length, *layers)
    for rows, (_, begin, end) in zip(parts, pieces, strict=True):
        expert_ids[:, begin:end] = 0 if rows is None else rows.expert_ids[:, begin:end]
        validity[:, begin:end] = False if rows is None else next(forms)[:, begin:end]
    versions = {rows.weight_version for rows in parts if rows is not None}
    version = versions.pop() if len(versions) == 1 else None
    return replace_trusted(like, expert_ids, validity, weight_version=version)


def _joined_versions(pieces: Sequence[_Piece]) -> Tensor:
    """int32 `[S]`, -1 where unknown."""
    versions = torch.full((pieces[-1].end,), -1, dtype=torch.int32)
    for turn, begin, end in pieces:
        if turn is not None and turn.row_versions is not None:
            versions[begin:end] = turn.row_versions[begin:end]
    return versions


def _took_part(turn: Rollout) -> bool:
    """Whether a turn sampled a token or captured a row: an abort may end it before either."""
    return bool(turn.response_mask.any()) or (turn.routing is not None and turn.routing.rows_valid > 0)


def _require_options(overlap: str, trim: int) -> None:
    if trim < 0:
        raise CaptureError(f"trim: expected a number of tokens from 0 up, got {trim}")
    if overlap not in get_args(Overlap):
        raise CaptureError(f"overlap: expected one of {', '.join(get_args(Overlap))}, got {overlap!r}")
