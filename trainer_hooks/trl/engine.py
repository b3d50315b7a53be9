"""TRL's vLLM engine, in this process or behind a URL: started or asked so that it captures, and what it answered."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from r3.capture import Rollout, capture_kwargs, collect
from r3.errors import CaptureError
from r3.parallel import RankBarrier
from r3.routing import RoutingSpec


@contextlib.contextmanager
def capturing_engine() -> Iterator[None]:
    """Context in which TRL starts engines that capture, and connects to servers without its own weight transfer."""
    from trl.generation import vllm_generation

    llm, client = vllm_generation.LLM, vllm_generation.VLLMClient

    def capturing(**kwargs: Any) -> Any:
        more = capture_kwargs(worker_extension_cls=kwargs.get("worker_extension_cls"))
        for name, value in more.items():
            if isinstance(value, dict):
                more[name] = {**value, **(kwargs.get(name) or {})}
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


class EngineAnswers:
    """The engine's last answers, as rollouts of this rank's prompts.

    Args:
        generation: TRL's `VLLMGeneration`.
        spec: of the trainer's model.
        barrier: of all ranks; None if there is one.
    """

    def __init__(self, generation: Any, spec: RoutingSpec, barrier: RankBarrier | None) -> None:
        self._spec = spec
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
            return answer

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
        return collect(self._answers[first : first + prompts], self._spec, weight_version=version).items

    def _from_server(self, prompts: int, version: int) -> list[Rollout]:
        if self._barrier is None:
            return collect(self._answers, self._spec, weight_version=version).items
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, prompts)
        parts: list[Any] | None = None
        with self._barrier.guard():
            if dist.get_rank() == 0:
                items = collect(self._answers, self._spec, weight_version=version).items
                # As TRL cuts its completions: a rank's share begins at its number times its prompts.
                parts = [items[rank * count : (rank + 1) * count] for rank, count in enumerate(counts)]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts, src=0)
        return mine[0]
