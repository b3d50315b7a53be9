"""`explain`: scores saved rollouts with a model on this machine, and finds what explains the gap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from r3.capture import Rollouts, SamplingSettings, load_rollouts, saved_settings
from r3.errors import DiagnosticsError
from r3.explain.adjustments import Adjustment
from r3.explain.decision import DecisionInputs, decide
from r3.explain.distributions import Distribution, candidates, exclusions
from r3.explain.evidence import Evidence, ScoredTokens
from r3.explain.outcome import Explanation
from r3.explain.scoring import Scores, ShiftedView, score_rollouts, scored

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LIVE, REPLAYED = (
    (ShiftedView(),),
    (
        ShiftedView(),
        ShiftedView(replayed=True),
        ShiftedView(replayed=True, rows=1),
        ShiftedView(replayed=True, rows=-1),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the work.

    Attributes:
        max_tokens: sampled tokens that are scored: whole rollouts, from the first on, up to this number.
        tokens_at_once: padded tokens in one forward.
    """

    max_tokens: int = 16_384
    tokens_at_once: int = 4096


UNKNOWN, LIMITS = SamplingSettings(), Limits()


def explain_file(
    model: str, path: Path, *, earlier: Sequence[str] = (), device: str | None = None, limits: Limits = LIMITS
) -> Explanation:
    """`explain` of a file that `save_rollouts` wrote, with its settings.

    Raises:
        CaptureError: not such a file. Otherwise as `explain`.
    """
    settings = saved_settings(path)
    return explain(model, load_rollouts(path), settings, earlier=earlier, device=device, limits=limits)


def explain(
    model: str,
    rollouts: Rollouts,
    settings: SamplingSettings = UNKNOWN,
    *,
    earlier: Sequence[str] = (),
    device: str | None = None,
    limits: Limits = LIMITS,
) -> Explanation:
    """Find what explains the gap between the log-probabilities of `rollouts` and those of a model.

    Args:
        model: folder of the checkpoint that the rollouts are thought to be from.
        rollouts: with or without routing.
        settings: settings under which they were sampled. An unknown temperature counts as 1.
        earlier: checkpoints that the engine may still have had.
        device: as torch names it; by default a GPU where there is one.
        limits: of the work.

    Raises:
        DiagnosticsError: no checkpoint, another vocabulary, log-probabilities that are no numbers, no sampled tokens.
        UnsupportedModelError: the model cannot replay routing.
    """
    rollouts = _first(rollouts, limits.max_tokens)
    tokens = ScoredTokens.of(rollouts)
    if not tokens.usable.any():
        raise DiagnosticsError("rollouts: expected sampled tokens with log-probabilities, got none")
    expected = expected_of(settings)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES.get(settings.dtype or "bfloat16", torch.bfloat16)
    views = LIVE if rollouts.spec is None else REPLAYED
    scores = partial(score_rollouts, rollouts=rollouts, device=where, tokens_at_once=limits.tokens_at_once)
    grid = partial(candidates, expected)
    excluding = partial(exclusions, expected)
    own = scores(model, distributions=grid, views=views, dtype=dtype, excluding=excluding)
    tables, masses, excluded, names = dict(own.table), dict(own.masses), dict(own.excluded), [model, *earlier]
    for place, checkpoint in enumerate(earlier, start=1):
        older: Scores = scores(checkpoint, distributions=grid, views=views, dtype=dtype, excluding=excluding)
        if older.vocabulary != own.vocabulary:
            raise DiagnosticsError(
                f"{checkpoint}: expected a vocabulary of {own.vocabulary} as {model} has, got {older.vocabulary}: not "
                "an earlier checkpoint of it"
            )
        tables |= {replace(view, weights=place): table for view, table in older.table.items()}
        masses |= {replace(view, weights=place): table for view, table in older.masses.items()}
        excluded |= {replace(view, weights=place): share for view, share in older.excluded.items()}
    # The other precision, to measure the effect of precision alone.
    other_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    bare = scores(model, distributions=grid, views=views[:2], dtype=other_dtype)
    chosen = grid(own.vocabulary)
    evidence = Evidence(
        tokens=tokens,
        distributions=chosen,
        tables=tables,
        expected=expected,
        exclusions=excluding(own.vocabulary),
        masses=masses,
        excluded=excluded,
    )
    return decide(
        DecisionInputs(
            evidence=evidence,
            precision={view: own.table[view] - table for view, table in bare.table.items()},
            routing=own.routing,
            settings=settings,
            names=names,
            rollouts=len(rollouts),
        )
    )


def expected_of(settings: SamplingSettings) -> Distribution:
    """The distribution of the settings, as far as it can be recomputed."""
    return Distribution(
        temperature=settings.temperature or 1.0,  # greedy: vLLM leaves the logits as they are
        top_p=settings.top_p or 1.0,
        top_k=max(settings.top_k or 0, 0),
        min_p=settings.min_p or 0.0,
        adjustment=Adjustment(
            presence_penalty=settings.presence_penalty or 0.0,
            frequency_penalty=settings.frequency_penalty or 0.0,
            repetition_penalty=settings.repetition_penalty or 1.0,
            logit_bias=settings.logit_bias or (),
            allowed_token_ids=settings.allowed_token_ids or (),
        ),
    )


def _first(rollouts: Rollouts, max_tokens: int) -> Rollouts:
    """The first of the rollouts with sampled tokens, until they have `max_tokens`."""
    kept, tokens = [], 0
    for rollout in rollouts:
        count = int(scored(rollout).sum())
        if count and (not kept or tokens + count <= max_tokens):
            kept.append(rollout)
            tokens += count
    return replace(rollouts, items=kept)
