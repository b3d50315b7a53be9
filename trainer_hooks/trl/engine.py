"""TRL's vLLM engine, in this process or behind a URL: started or asked so that it captures, and what it answered."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from r3.capture import Rollout, capture_kwargs, collect
from r3.errors import CaptureError, ConfigError
from r3.parallel import RankBarrier
from r3.routing import RoutingSpec
from trainer_hooks.sampling_sets import of_sampled_tokens


@contextlib.contextmanager
def capturing_engine(logprobs: int) -> Iterator[None]:
    """Context in which TRL starts engines that capture, and connects to servers without its own weight transfer.

    Args:
        logprobs: that requests ask for.
    """
    from trl.generation import vllm_generation

    llm, client = vllm_generation.LLM, vllm_generation.VLLMClient

    def capturing(**kwargs: Any) -> Any:
        more = capture_kwargs(worker_extension_cls=kwargs.get("worker_extension_cls"))
        for name, value in more.items():
            if isinstance(value, dict):
                more[name] = {**value, **(kwargs.get(name) or {})}
        if logprobs:
            more["max_logprobs"] = max(logprobs, kwargs.get("max_logprobs", 0))
        return llm(**{**kwargs, **more})

    class Client(client):
        def init_communicator(self, device: Any = 0) -> None:
            """Nothing: weights go by r3's sync, which has transports of its own."""

    vllm_generation.LLM, vllm_generation.VLLMClient = capturing, Client
    try:
        yield
    finally:
        vllm_generation.LLM, vllm_generation.VLLMClient = llm, client


def _without_text(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`LLM.generate` that makes no text, and one list of log-probabilities instead of an object a token.

    TRL decodes token ids by itself. In its own process the engine would make both between two steps of the model.
    """

    def asked(*args: Any, **kwargs: Any) -> Any:
        sampling = kwargs["sampling_params"]
        sampling.flat_logprobs = True
        sampling.detokenize = bool(sampling.stop)  # stop strings are looked for in text
        return generate(*args, **kwargs)

    return asked


def _of_sampled(answer: Any) -> Any:
    """The same answer, of `LLM.generate` or of a server, with log-probabilities of the sampled tokens alone.

    TRL takes the likeliest one of those of a token for that of the sampled token.
    """
    if isinstance(answer, list):
        return [
            _replaced(output, outputs=[_replaced(each, logprobs=of_sampled_tokens(each)) for each in output.outputs])
            for output in answer
        ]
    return {**answer, "choices": [_sampled_of_server(choice) for choice in answer["choices"]]}


def _sampled_of_server(choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = dict(choice["logprobs"])
    if "content" in logprobs:
        logprobs["content"] = [{**entry, "top_logprobs": []} for entry in logprobs["content"]]
    else:
        logprobs["top_logprobs"] = [None] * len(logprobs["tokens"])
    return {**choice, "logprobs": logprobs}


def _replaced(thing: Any, **attributes: Any) -> Any:
    made = copy.copy(thing)
    vars(made).update(attributes)
    return made


class EngineAnswers:
    """The engine's last answers, as rollouts of this rank's prompts.

    Args:
        generation: TRL's `VLLMGeneration`.
        spec: of the trainer's model.
        barrier: of all ranks; None if there is one.
        sampling_mask: whether rollouts come with the ids that each token was sampled from.
    """

    def __init__(self, generation: Any, spec: RoutingSpec, barrier: RankBarrier | None, *, sampling_mask: bool) -> None:
        self._spec = spec
        self._sampling_mask = sampling_mask
        self._barrier = barrier
        self._server = generation.mode == "server"
        self._tp_size = generation.tensor_parallel_size
        self._tp_group = getattr(generation, "tp_group", None)
        self._answers: list[Any] = []
        if not self._server:
            generation.llm.generate = self._recording(_without_text(generation.llm.generate))
        elif hasattr(generation, "vllm_client"):  # on the main process
            generation.vllm_client._post = self._recording(generation.vllm_client._post)

    def _recording(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            answer = ask(*args, **kwargs)
            if isinstance(answer, list):
                self._answers = answer
            elif "choices" in answer:
                self._answers.append(answer)
            else:
                return answer
            return _of_sampled(answer) if self._sampling_mask else answer

        return asked

    def forget(self) -> None:
        """Drop what was answered."""
        self._answers = []

    def take(self, prompts: int, version: int) -> list[Rollout]:
        """One rollout of each of this rank's `prompts`, in their order, sampled with weights of `version`.

        Every rank calls this.

        Raises:
            CaptureError: an answer without routing, or one that cannot be right; not as many as `prompts`.
        """
        rollouts = self._from_server(prompts, version) if self._server else self._from_engine(prompts, version)
        self.forget()
        if len(rollouts) != prompts:
            raise CaptureError(f"expected one completion of each of {prompts} prompts, got {len(rollouts)}")
        return rollouts

    def _from_engine(self, prompts: int, version: int) -> list[Rollout]:
        # A tensor-parallel group answers for the prompts of all its ranks, on each of them.
        first = dist.get_rank(self._tp_group) * prompts if self._tp_size > 1 else 0
        return self._collected(self._answers[first : first + prompts], version)

    def _from_server(self, prompts: int, version: int) -> list[Rollout]:
        if self._barrier is None:
            return self._collected(self._answers, version)
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, prompts)
        parts: list[Any] | None = None
        with self._barrier.guard():
            if dist.get_rank() == 0:
                items = self._collected(self._answers, version)
                # As TRL cuts its completions: a rank's share begins at its number times its prompts.
                parts = [items[rank * count : (rank + 1) * count] for rank, count in enumerate(counts)]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts, src=0)
        return mine[0]

    def _collected(self, answers: list[Any], version: int) -> list[Rollout]:
        return collect(answers, self._spec, weight_version=version, sampling_mask=self._sampling_mask).items


def require_server_logprobs(served: int, asked: int) -> None:
    """Raise unless a server that gives `served` log-probabilities of a token gives as many as are asked for.

    Raises:
        ConfigError: with the setting to start it with.
    """
    if 0 <= served < asked:
        raise ConfigError(
            f"the server's max_logprobs: expected {asked} or more, since top_k, top_p or min_p cut what is sampled "
            f"from, got {served}. Start it with --max-logprobs {asked}"
        )
