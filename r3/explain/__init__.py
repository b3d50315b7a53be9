"""`r3 explain`: what explains the gap between saved rollouts and a model; and `compare_files`: how two files differ."""

from r3.explain.explain import Limits, explain, explain_file
from r3.explain.outcome import Cause, Explanation, Tried
from r3.explain.pairs import PairComparison, Side, compare_files
from r3.explain.rendering import explanation_lines, pair_lines

CAUSES = (
    "routing",
    "precision",
    "shifted_rows",
    "foreign_rows",
    "shifted_logprobs",
    "stale_sync",
    "weights",
    "temperature",
    "renormalised",
    "adjusted",
    "raw_logprobs",
    "unexplained",
)
"""Names that a `Cause` may have. All but the first two say that something is wrong."""

__all__ = [
    "CAUSES",
    "Cause",
    "Explanation",
    "Limits",
    "PairComparison",
    "Side",
    "Tried",
    "compare_files",
    "explain",
    "explain_file",
    "explanation_lines",
    "pair_lines",
]
