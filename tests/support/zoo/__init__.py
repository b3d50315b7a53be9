"""One tiny model with random weights for every mixture-of-experts family of the installed transformers."""

from zoo.case import Case, Seen
from zoo.families import ARCHITECTURES, CANNOT_RUN, CASES, NOT_HERE, NOT_REENTRANT, listed

__all__ = ["ARCHITECTURES", "CANNOT_RUN", "CASES", "NOT_HERE", "NOT_REENTRANT", "Case", "Seen", "listed"]
