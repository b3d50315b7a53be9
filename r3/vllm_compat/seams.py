"""What r3 relies on in vLLM beyond its documented interface: checked by reading its sources, without a run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from r3.vllm_compat.server import ARGUMENTS, MAIN
from r3.vllm_compat.source_tree import SourceTree


@dataclass(frozen=True)
class Seam:
    """A place in vLLM's source.

    Attributes:
        part: of r3 that relies on it.
        places: `module`, or `module:Class.attribute`; any one will do.
        parameters: names that the function takes.
    """

    part: str
    places: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def _all(part: str, within: str, *names: str) -> list[Seam]:
    """A seam for each of `names`, as `name` or `name(parameter, parameter)`, all of them `within` one place."""
    seams = []
    for text in names:
        name, _, taken = text.rstrip(")").partition("(")
        seams.append(Seam(part, (f"{within}{name}",), tuple(filter(None, taken.split(", ")))))
    return seams


_MOE = "vllm.model_executor.layers.fused_moe"
_RELOAD = "vllm.model_executor.model_loader.reload"
_CLIENT = "vllm.v1.engine.core_client"

SEAMS: list[Seam] = [
    # The engine, as users hold it.
    *_all("engines", "vllm:", "LLM", "SamplingParams", "AsyncEngineArgs"),
    *_all(
        "engines",
        "vllm.engine.arg_utils:EngineArgs.",
        "enable_return_routed_experts",
        "scheduler_cls",
        "worker_cls",
        "worker_extension_cls",
        "logprobs_mode",
        "hf_overrides",
        "compilation_config",
        "kv_cache_memory_bytes",
    ),
    *_all(
        "engines",
        "vllm.entrypoints.llm:LLM.",
        "generate",
        "collective_rpc(method, timeout, args)",
        "reset_prefix_cache(reset_running_requests, reset_connector)",
        "reset_mm_cache",
        "llm_engine",
    ),
    *_all(
        "engines",
        "vllm.v1.engine.llm_engine:LLMEngine.",
        "add_request",
        "has_unfinished_requests",
        "reset_encoder_cache",
        "engine_core",
        "vllm_config",
    ),
    *_all(
        "engines",
        "vllm.v1.engine.async_llm:AsyncLLM.",
        "generate(prompt, sampling_params, request_id)",
        "add_request",
        "resume_generation",
        "reset_mm_cache",
        "reset_encoder_cache",
        "output_handler",
        "engine_core",
        "errored",
        "vllm_config",
    ),
    *_all(
        "engines",
        f"{_CLIENT}:",
        "AsyncMPClient.pause_scheduler_async(mode, clear_cache)",
        "AsyncMPClient._call_utility_async(method, engine)",
        "AsyncMPClient.core_engines",
        "AsyncMPClient.resources",
        "SyncMPClient._send_input(request_type, request)",
        "BackgroundResources.engine_dead",
        "BackgroundResources.output_queue_task",
    ),
    *_all(
        "engines",
        "vllm.v1.engine.core:EngineCore.",
        "collective_rpc(method, timeout, args)",
        "reset_prefix_cache(reset_running_requests, reset_connector)",
        "is_scheduler_paused",
        "pause_scheduler(mode, clear_cache)",
    ),
    Seam("server", tuple(f"{module}:FrontendArgs" for module in ARGUMENTS)),
    Seam("server", tuple(f"{module}:FrontendArgs.middleware" for module in ARGUMENTS)),
    Seam("server", tuple(f"{module}:main" for module in MAIN) + MAIN[1:]),
    # Capture.
    *_all(
        "capture",
        "vllm.sampling_params:SamplingParams.",
        "routed_experts_prompt_start",
        "output_kind",
        "logprobs",
        "flat_logprobs",
        "detokenize",
        "stop",
    ),
    *_all("capture", "vllm.sampling_params:RequestOutputKind.", "FINAL_ONLY", "CUMULATIVE"),
    *_all("capture", "vllm.outputs:CompletionOutput.", "index", "token_ids", "logprobs", "routed_experts"),
    *_all("capture", "vllm.outputs:RequestOutput.", "add(next_output, aggregate)", "prompt_token_ids", "outputs"),
    Seam("capture", ("vllm.triton_utils:HAS_TRITON",)),
    Seam("capture", (f"{_MOE}.routed_experts_capturer:RoutedExpertsManager", "vllm.distributed.aux_output_connector")),
    *_all(
        "capture",
        "vllm.v1.engine:EngineCoreOutput.",
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "finish_reason",
        "routed_experts",
    ),
    *_all("capture", "vllm.v1.engine:EngineCoreOutputs.", "outputs", "finished_requests", "scheduler_stats"),
    *_all(
        "capture",
        "vllm.v1.core.sched.scheduler:Scheduler.",
        "schedule",
        "add_request(request)",
        "update_from_output(scheduler_output, model_runner_output)",
        "_preempt_request(request)",
        "_free_request(request)",
        "requests",
        "kv_cache_manager",
        "kv_cache_config",
    ),
    Seam("capture", ("vllm.v1.core.sched.async_scheduler:AsyncScheduler",)),
    *_all("capture", "vllm.v1.core.kv_cache_manager:", "KVCacheManager.get_blocks", "KVCacheBlocks.get_block_ids"),
    *_all(
        "capture",
        "vllm.v1.core.sched.output:",
        "SchedulerOutput.scheduled_new_reqs",
        "SchedulerOutput.scheduled_cached_reqs",
        "SchedulerOutput.num_scheduled_tokens",
        "SchedulerOutput.total_num_scheduled_tokens",
        "CachedRequestData.req_ids",
        "CachedRequestData.num_computed_tokens",
        "NewRequestData.req_id",
        "NewRequestData.num_computed_tokens",
    ),
    *_all("capture", "vllm.v1.outputs:ModelRunnerOutput.", "req_ids"),
    *_all("capture", "vllm.v1.request:Request.", "request_id", "sampling_params", "num_output_tokens", "num_tokens"),
    *_all("capture", f"{_MOE}.layer:MoERunner.", "router", "layer_id", "_quant_method"),
    *_all(
        "capture",
        f"{_MOE}.router.base_router:BaseRouter.",
        "set_capture_fn(capture_fn)",
        "top_k",
        "global_num_experts",
    ),
    *_all("capture", "vllm.v1.worker.cpu_worker:CPUWorker.", "init_device", "load_model", "model_runner"),
    *_all("capture", "vllm.v1.worker.gpu_worker:Worker.", "init_device", "load_model", "model_runner"),
    *_all("capture", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.", "execute_model", "sample_tokens"),
    *_all("capture", "vllm.v1.kv_cache_interface:", "FullAttentionSpec"),
    *_all("capture", "vllm.sequence:", "IntermediateTensors.tensors"),
    *_all("capture", "vllm.distributed:", "get_pp_group"),
    # Weight sync, in the workers.
    *_all(
        "weight sync",
        f"{_RELOAD}:",
        "initialize_layerwise_reload(model)",
        "finalize_layerwise_reload(model, model_config)",
    ),
    *_all(
        "weight sync",
        f"{_RELOAD}.layerwise:",
        "LOADING_LAYERS",
        "get_layerwise_info(layer)",
        "get_numel_loaded",
        "materialize_layer",
        "_layerwise_process(layer, info)",
        "_copy_and_restore_kernel_tensors(layer, info)",
        "_place_kernel_tensors(layer, info)",
    ),
    *_all("weight sync", f"{_RELOAD}.types:LayerReloadingInfo.", "load_numel", "kernel_tensors", "can_load", "reset"),
    Seam("weight sync", (f"{_RELOAD}.meta:SKIP_LOAD_TENSORS", f"{_RELOAD}.meta:SKIP_TENSORS")),
    *_all("weight sync", f"{_RELOAD}.meta:", "to_meta_tensor(tensor)"),
    Seam(
        "weight sync",
        (
            "vllm.model_executor.layers.attention:is_deferred_attention_layer",
            "vllm.model_executor.layers.attention:MLAAttention",
        ),
    ),
    *_all(
        "weight sync",
        f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.",
        "process_weights_after_loading(layer)",
        "moe_kernel",
    ),
    *_all("weight sync", "vllm.model_executor.model_loader.utils:", "record_metadata_for_reloading(model)"),
    *_all("weight sync", "vllm.config:", "set_current_vllm_config(vllm_config)"),
    *_all("weight sync", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.", "model", "kv_caches", "device"),
]

ROUTES = (
    *("/pause", "/resume", "/is_paused", "/collective_rpc", "/get_world_size"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    *("/health", "/version", "/v1/models", "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"),
)
"""Of the HTTP server, in its development mode where they are for control."""


@dataclass(frozen=True)
class Report:
    """How vLLM's sources answer to the seams.

    Attributes:
        checked: seams and routes.
        unmet: one line for each that is not as r3 relies on it.
    """

    checked: int
    unmet: list[str]

    def __str__(self) -> str:
        return f"{self.checked - len(self.unmet)} of {self.checked}"


def check_seams(root: Path | None = None) -> Report:
    """Check all seams.

    Args:
        root: the folder that holds the package `vllm`; None for the installed one, which is not imported.

    Raises:
        FileNotFoundError: there is no vLLM.
    """
    if root is None:
        spec = find_spec("vllm")
        root = None if spec is None or spec.origin is None else Path(spec.origin).parents[1]
    if root is None or not (root / "vllm").is_dir():
        raise FileNotFoundError(f"vLLM's sources: expected the package vllm in {root or 'this environment'}")
    tree = SourceTree(root)
    found = routes(root / "vllm" / "entrypoints")
    unmet = [text for seam in SEAMS if (text := _unmet(tree, seam))]
    unmet += [f"server: route {route}: not there" for route in ROUTES if route not in found]
    return Report(len(SEAMS) + len(ROUTES), unmet)


def routes(folder: Path) -> set[str]:
    """Paths that the decorators of a folder's functions serve."""
    pattern = re.compile(r"""@\w+\.(?:get|post|api_route)\(\s*["']([^"']+)["']""")
    return {path for file in folder.rglob("*.py") for path in pattern.findall(file.read_text(errors="replace"))}


def _unmet(tree: SourceTree, seam: Seam) -> str:
    """What is not as r3 relies on it; empty if all is."""
    lacking: Iterable[str] = ()
    for place in seam.places:
        found = tree.find(place)
        if found is None:
            continue
        taken = tree.parameters(found) if seam.parameters else None
        lacking = [] if taken is None else [name for name in seam.parameters if name not in taken]
        if not lacking:
            return ""
    where = f"{seam.part}: {' or '.join(seam.places)}"
    return f"{where}: takes no {', '.join(lacking)}" if lacking else f"{where}: not there"
