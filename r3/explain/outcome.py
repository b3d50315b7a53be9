"""The outcome of `r3 explain` as data: causes, figures, and whether something is wrong."""

from dataclasses import asdict, dataclass, field
from typing import Any

HARMLESS = frozenset({"routing", "precision"})
"""Causes that every sound set-up has: replay is for the first, and nothing is to be done about the second."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that explains a part of the gap, or a fault that was found beside it.

    Attributes:
        name: one of `r3.explain.CAUSES`.
        text: the finding in words, with figures.
        remedy: what to do; empty if nothing needs to be done.
        figures: the numbers of the text.
    """

    name: str
    text: str
    remedy: str = ""
    figures: dict[str, float | str] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return self.name not in HARMLESS


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One hypothesis.

    Attributes:
        text: in words.
        causes: the causes that it assumes.
        k3: gap that it leaves, nats a token.
        abs_mean: mean absolute difference that it leaves, nats.
    """

    text: str
    causes: tuple[str, ...]
    k3: float
    abs_mean: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The outcome.

    Attributes:
        tokens: how many sampled tokens were compared.
        rollouts: of how many rollouts.
        verdict: one sentence.
        causes: the causes found, the largest part of the gap first; "precision" is the remainder of an explained gap.
        k3: mean of exp(d) - 1 - d in nats, by what it is of: "live" and "replayed" as the trainer scores, "remaining"
            under the best explanation, and "precision", between the model's own scores in bfloat16 and float32.
        correlation: of the probabilities, scored as the trainer does and reported.
        tried: the best hypothesis for each set of causes, the smallest gap first.
        notes: other observations, and what could not be checked.
    """

    tokens: int
    rollouts: int
    verdict: str
    causes: tuple[Cause, ...]
    k3: dict[str, float]
    correlation: float
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether something is wrong: any cause but routing and precision, or no cause could be found."""
        return not self.causes or any(cause.wrong for cause in self.causes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the causes."""
        return tuple(cause.name for cause in self.causes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {"wrong": self.wrong, **asdict(self)}
