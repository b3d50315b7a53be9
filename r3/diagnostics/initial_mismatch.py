"""Whether an engine computes what the trainer computes: figures of the same tokens on both sides, and what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from r3.config import ENGINE_FAULTS, MOST_REPEAT_NATS
from r3.diagnostics.metric import Metric
from r3.errors import AlarmError, ConfigError, summary

# docs/reference/engines.md says what healthy families measure.
MOST_K3 = 2e-2
"""Nats a token."""
MOST_DIFFERING = 0.3
"""Of the choices of experts."""


@dataclass(frozen=True, kw_only=True)
class EngineAgreement:
    """How far an engine and the trainer are apart, of the same weights, on tokens that the engine sampled.

    Attributes:
        family: `model_type` of the trainer's model.
        tokens: sampled tokens that were compared.
        k3_live: nats a token, with the trainer's own choice of experts.
        k3_replayed: with the engine's choice replayed; None if routing is not captured.
        differing_rows: share of (token, layer) pairs where the trainer's own choice is another; None likewise.
        repeat_nats: mean over tokens of how far the engine's second answer at temperature 0 is from its first; None if
            it was not asked twice.
    """

    family: str
    tokens: int
    k3_live: float
    k3_replayed: float | None = None
    differing_rows: float | None = None
    repeat_nats: float | None = None

    METRICS = (
        Metric(name="k3_live", formula="`logprob_diff/live/k3` of them", unit="nats"),
        Metric(name="k3_replayed", formula="`logprob_diff/replayed/k3` of them", unit="nats"),
        Metric(name="differing_rows", formula="`routing/differing_rows` of them"),
        Metric(
            name="repeat_nats",
            formula="mean of abs(the engine's second answer - its first), log-probabilities at temperature 0",
            unit="nats",
        ),
    )

    @classmethod
    def from_metrics(
        cls, family: str, metrics: Mapping[str, float], *, repeat_nats: float | None = None
    ) -> EngineAgreement:
        """From flat metrics, by the names of `metrics.jsonl`."""
        return cls(
            family=family,
            tokens=int(metrics["logprob_diff/live/tokens"]),
            k3_live=metrics["logprob_diff/live/k3"],
            k3_replayed=metrics.get("logprob_diff/replayed/k3"),
            differing_rows=metrics.get("routing/differing_rows"),
            repeat_nats=repeat_nats,
        )

    @classmethod
    def from_record(cls, family: str, record: Mapping[str, float]) -> EngineAgreement:
        """From what `metrics` gave; the number of tokens is not kept."""
        found = {metric.name: record.get(f"engine/{metric.name}") for metric in cls.METRICS}
        return cls(family=family, tokens=0, **found)  # pyrefly: ignore

    def metrics(self) -> dict[str, float]:
        """Flat names, `engine/` and those in `METRICS`, of what was measured."""
        figures = {metric.name: getattr(self, metric.name) for metric in self.METRICS}
        return {f"engine/{name}": value for name, value in figures.items() if value is not None}

    def faults(self) -> dict[str, str]:
        """What arithmetic does not explain, by the names in `r3.config.ENGINE_FAULTS`; empty if all is well."""
        found: dict[str, str] = {}
        side = "live" if self.k3_replayed is None else "replayed"
        k3 = self.k3_live if self.k3_replayed is None else self.k3_replayed
        # Not `k3 > MOST_K3`: what is not a number is a fault as well.
        if self.repeat_nats is not None and not self.repeat_nats <= MOST_REPEAT_NATS:
            found["repetition"] = (
                f"the engine does not repeat itself: two answers to the same prompts at temperature 0 are "
                f"{self.repeat_nats:.2g} nats a token apart (bound {MOST_REPEAT_NATS:g}): it reads memory that nobody "
                "wrote, or its kernels race; try another attention backend, or another vLLM"
            )
        if not k3 <= MOST_K3:
            found["logprobs"] = (
                f"k3 is {k3:.2g} nats a token with {side} routing (bound {MOST_K3:g}; {self.k3_live:.2g} live): the "
                "engine computes another function than the trainer. Likely: weights that it does not load or keeps a "
                "stale copy of, a wrong attention path for this family on this device, a setting of the configuration "
                "that one side ignores (scoring_func, norm_topk_prob, tied embeddings), or another checkpoint"
            )
        if self.differing_rows is not None and not self.differing_rows <= MOST_DIFFERING:
            found["selection"] = (
                f"the trainer's routers choose other experts in {100 * self.differing_rows:.0f}% of rows (bound "
                f"{100 * MOST_DIFFERING:.0f}%)"
                + (
                    ""
                    if "logprobs" in found
                    else f", though with the engine's choice replayed k3 is {k3:.2g}: one side ignores what moves the "
                    "choice alone, such as a selection bias (e_score_correction_bias) or a limit on groups"
                )
            )
        return found

    def require(self, accepted: Iterable[str] = ()) -> None:
        """Raise `AlarmError` for faults that are not `accepted` by name.

        Raises:
            AlarmError: with family, figures, likely causes, and how to accept them.
            ConfigError: an accepted name that is none of `ENGINE_FAULTS`.
        """
        accepted = list(accepted)
        if unknown := sorted(set(accepted) - set(ENGINE_FAULTS)):
            raise ConfigError(f"accepted faults: expected any of {', '.join(ENGINE_FAULTS)}, got {', '.join(unknown)}")
        found = {name: text for name, text in self.faults().items() if name not in accepted}
        if found:
            raise AlarmError(
                f"the engine does not agree with the trainer on {self.family}, of the same weights, over {self.tokens} "
                f"sampled tokens:{summary(f'{name}: {text}' for name, text in found.items())}\n"
                "A run would train on this from its first step. "
                "docs/reference/engines.md lists families; to train all the same: "
                f"trainer.diagnostics.accepted_engine_faults=[{','.join({*accepted, *found})}]"
            )
