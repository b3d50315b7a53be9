"""Under what settings rollouts were sampled: what a reader of saved ones has to know to compute the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from r3.config import R3Config
from r3.errors import CaptureError, summary

PROCESSED, RAW = "processed_logprobs", "raw_logprobs"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What was set where the rollouts come from; None where it is not known.

    Attributes:
        temperature: the logits were divided by it.
        top_p: the nucleus's mass; 1.0 for the whole distribution.
        top_k: only so many tokens were allowed; -1 or 0 for all.
        logprobs_mode: vLLM's, "processed_logprobs" or "raw_logprobs".
        dtype: of the engine's weights, as "bfloat16".
        weight_version: the version that the trainer had when it saved them.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    logprobs_mode: str | None = None
    dtype: str | None = None
    weight_version: int | None = None

    @classmethod
    def of(cls, config: R3Config, *, weight_version: int | None = None) -> "SamplingSettings":
        """Those of an engine that was made with `engine_kwargs(config)` and asked with `sampling_kwargs(config)`."""
        return cls(
            temperature=float(config.generator.sampling_params.temperature),
            top_p=1.0,
            top_k=-1,
            logprobs_mode=PROCESSED,
            dtype=config.generator.inference_engine.dtype,
            weight_version=weight_version,
        )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "SamplingSettings":
        """The same from names and values.

        Raises:
            CaptureError: an unknown name, or a value of another type or out of range.
        """
        known = {item.name for item in fields(cls)}
        problems = [f"{name!r}: expected one of {', '.join(sorted(known))}" for name in sorted(given.keys() - known)]
        found = {name: value for name, value in given.items() if name in known and value is not None}
        for name, value in found.items():
            expected = _EXPECTED[name]
            if isinstance(value, bool) or not isinstance(value, expected.types) or not expected.holds(value):
                problems.append(f"{name}: expected {expected.words}, got {value!r:.80}")
        if problems:
            raise CaptureError(f"settings of saved rollouts:{summary(problems)}")
        return cls(**{name: _EXPECTED[name].types[0](value) for name, value in found.items()})

    def to_dict(self) -> dict[str, Any]:
        """Names and values, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Expected:
    types: tuple[type, ...]
    holds: Any
    words: str


_EXPECTED = {
    "temperature": _Expected((float, int), lambda t: 0 <= t < float("inf"), "a number from 0 up"),
    "top_p": _Expected((float, int), lambda p: 0 < p <= 1, "a number above 0, at most 1"),
    "top_k": _Expected((int,), lambda k: -1 <= k < 1 << 31, "an integer from -1 up"),
    "logprobs_mode": _Expected((str,), lambda m: m in (PROCESSED, RAW), f"{PROCESSED} or {RAW}"),
    "dtype": _Expected((str,), lambda d: 0 < len(d) <= 32, "the name of a dtype"),
    "weight_version": _Expected((int,), lambda v: abs(v) < 1 << 63, "an integer"),
}
