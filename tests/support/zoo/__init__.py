"""One tiny model with random weights for every mixture-of-experts family of the installed transformers."""

from zoo.case import Case, Seen
from zoo.families import CASES, NOT_HERE

__all__ = ["CASES", "NOT_HERE", "Case", "Seen"]
