"""swift's colocated vLLM engine: the arguments with which it captures, its sets, and the form in which r3 syncs it."""

from typing import Any

from r3.capture import capture_kwargs
from r3.capture.kept_ids import kept_by_engine
from trainer_hooks.sampling_sets import of_sampled_tokens

CAPTURE = "enable_return_routed_experts"
SETS = "sampling_sets"
"""Of a choice in swift's responses, `r3.capture.kept_ids.KeptIds`: the ids that each token was sampled from."""


def is_on(args: Any) -> bool:
    """Whether swift's arguments leave capture, and with it replay, on: all but an explicit false."""
    return bool((args.vllm_engine_kwargs or {}).get(CAPTURE, True))


def sampling(args: Any) -> dict[str, Any]:
    """What swift's requests sample with, as `vllm.SamplingParams`."""
    return {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")}


def ask_for_capture(args: Any, logprobs: int) -> None:
    """Set in swift's arguments what the engine that swift will start needs for capture and for r3's weight sync.

    Args:
        args: swift's.
        logprobs: that requests ask for.

    Raises:
        ConfigError: this vLLM cannot capture so.
    """
    given = args.vllm_engine_kwargs or {}
    more = capture_kwargs(worker_extension_cls=given.get("worker_extension_cls"))
    for name, value in more.items():
        if isinstance(value, dict):
            more[name] = {**value, **(given.get(name) or {})}
    # swift has a setting of its own for this one, and passes it a second time.
    args.vllm_enforce_eager = more.pop("enforce_eager", args.vllm_enforce_eager)
    if logprobs:
        more["max_logprobs"] = max(logprobs, given.get("max_logprobs", 0))
    args.vllm_engine_kwargs = {**given, **more}


def keep_sets(engine: Any) -> None:
    """Have swift's engine put the sets of each completion on its choice, under `SETS`."""
    respond = engine._create_chat_completion_response

    def responded(result: Any, *args: Any, **kwargs: Any) -> Any:
        sets = [kept_by_engine(completion) for completion in result.outputs]
        for completion in result.outputs:
            completion.logprobs = of_sampled_tokens(completion)  # swift makes text of each
        response = respond(result, *args, **kwargs)
        for choice, own in zip(response.choices, sets, strict=True):
            setattr(choice, SETS, own)
        return response

    engine._create_chat_completion_response = responded


def as_llm(engine: Any) -> Any:
    """The `vllm.LLM` around a `LLMEngine`: swift has the inner one alone, `WeightSync` takes the outer."""
    from vllm import LLM

    llm = object.__new__(LLM)
    llm.llm_engine = engine
    return llm
