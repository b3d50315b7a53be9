"""The settings under which rollouts were sampled, which a reader needs to recompute their log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from r3.config import R3Config
from r3.errors import CaptureError, summary

PROCESSED, RAW = "processed_logprobs", "raw_logprobs"
# Of `SamplingParams`: they change the distribution in ways that need the tokenizer, a grammar or foreign code.
OPAQUE = (
    "bad_words",
    "min_tokens",
    "structured_outputs",
    "logits_processors",
    "thinking_token_budget",
    "watermarking",
    "trace_decode_token_ids",
    "extra_args",
)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of the engine and requests that sampled the rollouts; None where unknown.

    Attributes:
        temperature: the logits were divided by it.
        top_p: the nucleus's mass; 1.0 for the whole distribution.
        top_k: number of most probable tokens that were kept; -1 or 0 for all.
        min_p: least probability of kept tokens, relative to the most probable one; 0.0 keeps all.
        presence_penalty, frequency_penalty: taken from the logits of tokens sampled before, once or each time; 0.0 for
            none.
        repetition_penalty: logits of tokens seen before, the prompt's included, were divided by it, or multiplied where
            negative; 1.0 for none.
        logit_bias: (token id, what was added to its logit) pairs; empty for none.
        allowed_token_ids: no others were sampled; empty for all.
        other: names of other changes of the distribution, which cannot be recomputed. Empty for none.
        logprobs_mode: vLLM's, "processed_logprobs" or "raw_logprobs".
        dtype: of the engine's weights, as "bfloat16".
        weight_version: the version that the trainer had when it saved them.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    other: tuple[str, ...] | None = None
    logprobs_mode: str | None = None
    dtype: str | None = None
    weight_version: int | None = None

    @classmethod
    def of(cls, config: R3Config, *, weight_version: int | None = None) -> "SamplingSettings":
        """The settings of an engine made with `engine_kwargs(config)` and sampled with `sampling_kwargs(config)`."""
        sampling = config.generator.sampling_params
        return cls(
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k or -1,
            min_p=float(sampling.min_p),
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            logit_bias=(),
            allowed_token_ids=(),
            other=(),
            logprobs_mode=PROCESSED,
            dtype=config.generator.inference_engine.dtype,
            weight_version=weight_version,
        )

    @classmethod
    def of_params(
        cls,
        params: Any,
        *,
        logits_processors: Sequence[str] = (),
        logprobs_mode: str | None = PROCESSED,
        dtype: str | None = None,
        weight_version: int | None = None,
    ) -> "SamplingSettings":
        """The settings of a `vllm.SamplingParams`, of any vLLM version.

        Args:
            params: of the requests.
            logits_processors: names of those that the engine was given.
            logprobs_mode, dtype: of the engine.
            weight_version: that the trainer has.
        """
        default = type(params)()
        changed = [name for name in OPAQUE if getattr(params, name, None) != getattr(default, name, None)]
        other = [f"{name}={getattr(params, name)!r:.80}" for name in changed]
        return cls.from_mapping(
            {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "min_p": params.min_p,
                "presence_penalty": params.presence_penalty,
                "frequency_penalty": params.frequency_penalty,
                "repetition_penalty": params.repetition_penalty,
                "logit_bias": sorted((params.logit_bias or {}).items()),
                "allowed_token_ids": params.allowed_token_ids or (),
                "other": [*other, *(f"logits processor {name}" for name in logits_processors)],
                "logprobs_mode": logprobs_mode,
                "dtype": dtype,
                "weight_version": weight_version,
            }
        )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "SamplingSettings":
        """The settings from a mapping of names to values.

        Raises:
            CaptureError: an unknown name, or a value of another type or out of range.
        """
        known = {item.name for item in fields(cls)}
        problems = [f"{name!r}: expected one of {', '.join(sorted(known))}" for name in sorted(given.keys() - known)]
        present = {name: value for name, value in given.items() if name in known and value is not None}
        for name, value in present.items():
            expected = _EXPECTED[name]
            if isinstance(value, bool) or not isinstance(value, expected.types) or not expected.holds(value):
                problems.append(f"{name}: expected {expected.words}, got {value!r:.80}")
        if problems:
            raise CaptureError(f"settings of saved rollouts:{summary(problems)}")
        return cls(**{name: _EXPECTED[name].made(value) for name, value in present.items()})

    def to_dict(self) -> dict[str, Any]:
        """Names and values, without those that are unknown."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Expected:
    types: tuple[type, ...]
    holds: Any
    words: str

    def made(self, value: Any) -> Any:
        if self.types[0] is not tuple:
            return self.types[0](value)
        return tuple((item[0], float(item[1])) if isinstance(item, list | tuple) else item for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_bias(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_id(value[0]) and _is_number(value[1])


_PENALTY = _Expected((float, int), _is_number, "a number")
_EXPECTED = {
    "temperature": _Expected((float, int), lambda t: 0 <= t < float("inf"), "a number from 0 up"),
    "top_p": _Expected((float, int), lambda p: 0 < p <= 1, "a number above 0, at most 1"),
    "top_k": _Expected((int,), lambda k: -1 <= k < 1 << 31, "an integer from -1 up"),
    "min_p": _Expected((float, int), lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _Expected((float, int), lambda r: 0 < r < float("inf"), "a number above 0"),
    "logit_bias": _Expected((tuple, list), lambda b: all(map(_is_bias, b)), "pairs of a token id and a number"),
    "allowed_token_ids": _Expected((tuple, list), lambda ids: all(map(_is_id, ids)), "token ids"),
    "other": _Expected((tuple, list), lambda o: all(isinstance(item, str) for item in o), "texts"),
    "logprobs_mode": _Expected((str,), lambda m: m in (PROCESSED, RAW), f"{PROCESSED} or {RAW}"),
    "dtype": _Expected((str,), lambda d: 0 < len(d) <= 32, "the name of a dtype"),
    "weight_version": _Expected((int,), lambda v: abs(v) < 1 << 63, "an integer"),
}
