"""A worker that captures by its own hooks, for engines in which vLLM refuses to capture: `LLM(worker_cls=...)`.

vLLM refuses on the CPU from 0.31 (its connector needs Triton) and with pipeline parallelism. The hook that it calls
with each router's choice is still there: this worker sets it, and gives each step's ids `[tokens, L, K]` to
`r3.capture.in_engine.routing_scheduler`, which knows the tokens' places in the KV cache.

Limits
1. One data-parallel rank an engine, no context parallelism, no sequence parallelism of the MoE layers, no microbatches.
2. On the CPU the engine must not compile: compiled code does not call the hook.
3. A layer whose hook was not called returns zeros, which `collect` refuses. One that was called with fewer rows than
   the step has tokens, as of layers that compute a part of the tokens only, or piece by piece, ends the engine.

Imported in the engine's worker processes alone.
"""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from r3.errors import CaptureError
from r3.vllm_compat.capture import captures_natively, decoder_layers, make_stage_buffers, parallel_sizes, routers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

KEY = "r3_rows"


class CapturingWorker(PlatformWorker):
    """vLLM's worker with hooks on its routers."""

    def init_device(self) -> None:
        check_settings(self.vllm_config)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        make_stage_buffers(self.model_runner)
        self.r3_hooks = RouterHooks(self.model_runner, self.vllm_config)


def check_settings(vllm_config: Any) -> None:
    """Raise `CaptureError` for settings under which hooks are not called, or rows cannot be told apart."""
    parallel = vllm_config.parallel_config
    sizes = {
        "data_parallel_size": parallel.data_parallel_size,
        **parallel_sizes(parallel),
    }
    wrong = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if getattr(parallel, "use_sequence_parallel_moe", False):
        wrong.append("sequence-parallel MoE layers")
    if getattr(parallel, "use_ubatching", False):
        wrong.append("microbatches (enable_dbo or ubatch_size)")
    if current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
        wrong.append("enforce_eager=False (compiled code on the CPU calls no hooks)")
    if captures_natively(vllm_config):
        wrong.append("enable_return_routed_experts=True (vLLM captures by itself)")
    if wrong:
        raise CaptureError(f"capture by hooks cannot work with {', '.join(wrong)}: leave out what is named")


class RouterHooks:
    """Captures the expert ids of a step's tokens in the routers of this worker.

    The model runner's `execute_model` and `sample_tokens` are wrapped: ids of earlier pipeline stages come, and those
    of this one go, beside the hidden states; the last stage gives them all to the scheduler.

    Args:
        runner: vLLM's model runner, with its model loaded.
        vllm_config: of the engine.
    """

    def __init__(self, runner: Any, vllm_config: Any) -> None:
        layer_routers = routers(runner.model)
        top_k = {router.top_k for _, router in layer_routers}
        experts = max(router.global_num_experts for _, router in layer_routers)
        if len(top_k) != 1:
            raise CaptureError(f"expected one number of experts a token in all layers, got {sorted(top_k)}")
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        shape = (tokens, decoder_layers(vllm_config), top_k.pop())
        self._ids = torch.zeros(shape, dtype=torch.int32, device=runner.device)
        self._dtype = torch.uint8 if experts <= 256 else torch.uint16
        for layer, router in layer_routers:
            router.set_capture_fn(lambda ids, layer=layer: self._capture(layer, ids))
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        self._tokens = 0  # of the step that runs; 0 in vLLM's own dummy runs
        self._step: torch.Tensor | None = None
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    def _capture(self, layer: int, ids: torch.Tensor) -> None:
        if len(ids) < self._tokens:  # more are padding
            raise CaptureError(
                f"decoder layer {layer}: expected the experts of all {self._tokens} tokens of the step, got "
                f"{len(ids)}: which tokens they are of is not known. Switch off what computes layers for a part of the "
                "tokens, or piece by piece (kv_sharing_fast_prefill, chunked MoE)"
            )
        self._ids[: len(ids), layer] = ids

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        self._step = None
        # A layer that is not called must leave zeros, and not the rows of the previous step.
        self._ids[:tokens].zero_()
        # Dummy runs have none: vLLM makes their tensors itself.
        earlier = None if intermediate_tensors is None else intermediate_tensors.tensors.pop(KEY, None)
        self._tokens = tokens
        try:
            output = self._execute(scheduler_output, intermediate_tensors, **kwargs)
        finally:
            self._tokens = 0
        if not tokens:
            return output
        ids = self._ids[:tokens]
        if earlier is not None:
            ids = ids + earlier  # each stage has zeros where another one has its layers
        if isinstance(output, IntermediateTensors):
            output.tensors[KEY] = ids.clone()
            return output
        self._step = ids.to(self._dtype).to("cpu", non_blocking=True)
        return self._attached(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._attached(self._sample(*args, **kwargs))

    def _attached(self, output: Any) -> Any:
        """`output`, with the ids of the step if it is the step's result; asynchronous results get them when read."""
        if output is None or self._step is None:
            return output
        step, self._step = self._step, None
        ready = torch.cuda.Event() if self._ids.is_cuda else None
        if ready is not None:
            ready.record()

        def attach(result: Any) -> Any:
            if ready is not None:
                ready.synchronize()
            setattr(result, KEY, step.numpy())
            return result

        if hasattr(output, "get_output"):
            get_output = output.get_output
            output.get_output = lambda *args, **kwargs: attach(get_output(*args, **kwargs))
            return output
        return attach(output)
