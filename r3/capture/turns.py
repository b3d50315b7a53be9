"""Checks that the turns of a conversation can be joined, and finds where they diverge."""

from collections.abc import Sequence

from r3.capture.rollout import Rollout
from r3.errors import CaptureError, summary

AROUND = 4
"""Tokens shown on either side of the position where two turns part."""


def ids_of(turn: Rollout) -> list[int]:
    """All P + G token ids."""
    return [*turn.prompt_ids, *turn.token_ids]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that lists `a` and `b` have in common."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def kept_length(before: Rollout, after: Rollout) -> int:
    """How many leading tokens of `before` the prompt of `after` begins with."""
    return shared_length(ids_of(before), list(after.prompt_ids))


def drift(before: Rollout, after: Rollout, trim: int) -> int | None:
    """Position at which the prompt of `after` diverges from the tokens of `before`; None if it begins with all of them.

    Also None if all that it lacks are at most `trim` tokens at the end of `before`, sampled in its last turn.
    """
    kept = kept_length(before, after)
    dropped = len(before) - kept
    prompt = len(before.prompt_ids)
    if not dropped or (dropped <= trim and kept >= prompt and bool(before.response_mask[kept - prompt :].all())):
        return None
    return kept


def require_continued(turns: Sequence[Rollout], trim: int) -> None:
    """Raise `CaptureError` unless each prompt begins with the turn before it, but for `trim` tokens at its end."""
    problems = []
    for number in range(1, len(turns)):
        before, after = turns[number - 1], turns[number]
        at = drift(before, after, trim)
        if at is None:
            continue
        sampled = at - len(before.prompt_ids)
        place = f"sampled token {sampled}" if sampled >= 0 else "in the prompt"
        problems.append(
            f"turns {number - 1} and {number} part at position {at} ({place} of turn {number - 1}): expected "
            f"{_window(ids_of(before), at)}, got {_window(after.prompt_ids, at)}"
        )
    if problems:
        raise CaptureError(
            f"each turn's prompt must begin with all tokens of the turn before it:{summary(problems)}\n"
            "The conversation was tokenised again from text, or its template drops or rewrites earlier tokens "
            "(thinking, for one). Send token ids: prompt_ids + token_ids + the new tokens; or use stitch_runs, which "
            "gives one rollout for each run of turns that hold together. If the template drops the last n sampled "
            "tokens of a turn, such as its end token: trim=n"
        )


def require_joinable(turns: Sequence[Rollout]) -> None:
    """Raise `CaptureError` for no turns, turns without tokens, and routing of different kinds."""
    if not turns:
        raise CaptureError("turns: expected at least one, got none")
    problems: list[str] = []
    kinds: dict[str, list[int]] = {}
    for number, turn in enumerate(turns):
        if not len(turn):
            problems.append(f"turn {number}: expected at least one token, got none")
        kinds.setdefault(_kind(turn), []).append(number)
    if len(kinds) > 1:
        problems.append(
            "expected routing of one kind in all turns, or in none; were they collected with the same spec? Got "
            + "; ".join(f"{kind} in turns {numbers}" for kind, numbers in kinds.items())
        )
    if problems:
        raise CaptureError(f"turns that cannot be joined:{summary(problems)}")


def _kind(turn: Rollout) -> str:
    routing = turn.routing
    if routing is None:
        return "no routing"
    return f"{routing.shape[3]} of {routing.num_experts} experts in layers {routing.layer_ids} on {routing.device}"


def _window(ids: Sequence[int], at: int) -> str:
    """Tokens around position `at`, which is marked."""
    begin, end = max(0, at - AROUND), min(len(ids), at + AROUND + 1)
    shown = [f">{ids[i]}<" if i == at else str(ids[i]) for i in range(begin, end)]
    if at >= len(ids):
        shown.append(">end<")
    return f"[{' '.join([*['...'][: begin > 0], *shown, *['...'][: end < len(ids)]])}]"
