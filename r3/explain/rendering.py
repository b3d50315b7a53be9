"""The text that `r3 explain` and `r3 compare FILE FILE` print."""

from collections.abc import Iterator

from r3.explain.outcome import Explanation
from r3.explain.pairs import PairComparison, Side

HYPOTHESES_SHOWN = 6


def explanation_lines(found: Explanation) -> Iterator[str]:
    """An explanation, line by line."""
    yield found.verdict
    yield ""
    yield f"{found.tokens} sampled tokens of {found.rollouts} rollouts; gap as mean k3, nats a token:"
    for name, value in found.k3.items():
        yield f"  {name:10} {value:.3e}"
    yield f"  probabilities as scored and as reported correlate by {found.correlation:.4f}"
    for cause in found.causes:
        yield ""
        yield f"{cause.name}{'' if cause.wrong else ' (nothing to do)'}: {cause.text}"
        if cause.remedy:
            yield f"  -> {cause.remedy}"
    yield ""
    yield "hypotheses that leave the smallest gap:"
    for tried in found.tried[:HYPOTHESES_SHOWN]:
        yield f"  k3 {tried.k3:.3e}  mean |d| {tried.abs_mean:.3e}  {tried.text}"
    for note in found.notes:
        yield f"note: {note}"


def pair_lines(found: PairComparison) -> Iterator[str]:
    """A comparison of two files, line by line."""
    yield found.verdict
    yield ""
    yield f"{'':24}{'first':>16}{'second':>16}"
    for name, of in _ROWS.items():
        yield f"{name:24}{of(found.a):>16}{of(found.b):>16}"
    if found.logprobs:
        yield ""
        yield "log-probabilities of the same tokens, first less second:"
        for name, value in found.logprobs.items():
            yield f"  {name:20} {value:.6g}"
    if found.routing:
        yield ""
        yield "routing of the same tokens, first against second:"
        for name, value in found.routing.items():
            yield f"  {name:24} {value:.6g}"
    for note in found.notes:
        yield f"note: {note}"


_ROWS = {
    "rollouts": lambda side: str(side.rollouts),
    "sampled tokens": lambda side: str(side.tokens),
    "mean length": lambda side: f"{side.length_mean:.2f}",
    "mean log-probability": lambda side: f"{side.logprob_mean:.4f}",
    "rows with routing": lambda side: f"{side.coverage:.4f}",
    "weight versions": lambda side: _versions(side),
    "failed": lambda side: str(side.failed),
}


def _versions(side: Side) -> str:
    if len(side.versions) > 3:
        return f"{side.versions[0]} to {side.versions[-1]}"
    return ", ".join(map(str, side.versions)) or "unknown"
