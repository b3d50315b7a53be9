"""swift's colocated vLLM engine: the arguments with which it captures, and the form in which r3 syncs it."""

from typing import Any

from r3.capture import capture_kwargs

CAPTURE = "enable_return_routed_experts"


def is_on(args: Any) -> bool:
    """Whether swift's arguments leave capture, and with it replay, on: all but an explicit false."""
    return bool((args.vllm_engine_kwargs or {}).get(CAPTURE, True))


def ask_for_capture(args: Any) -> None:
    """Set in swift's arguments what the engine that swift will start needs for capture and for r3's weight sync.

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
    args.vllm_engine_kwargs = {**given, **more}


def as_llm(engine: Any) -> Any:
    """The `vllm.LLM` around a `LLMEngine`: swift has the inner one alone, `WeightSync` takes the outer."""
    from vllm import LLM

    llm = object.__new__(LLM)
    llm.llm_engine = engine
    return llm
