"""The engine of a run, or the pool of engines, and its weight sync."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from r3.capture import Rollouts, collect, running_engine, running_servers
from r3.capture.engine import is_truncated
from r3.config import R3Config
from r3.errors import ConfigError
from r3.pool import EnginePool, PoolLimits
from r3.proxy import is_this_machine
from r3.routing import RoutingSpec
from r3.weight_sync import FilesTransport, GlooTransport, NcclTransport, SyncRanks, Transport, WeightSync, local_address
from r3.weight_sync.engines.engine import checked_mode
from trainer_hooks.random_states import kept_random_states, seed_engine

_OVER_NETWORKS: dict[str, Any] = {"gloo": GlooTransport, "nccl": NcclTransport}


@contextlib.contextmanager
def running_engines(config: R3Config) -> Iterator[Any]:
    """What samples, by the settings: a `vllm.LLM`, or an `EnginePool` over servers that are started or have addresses.

    Raises:
        ConfigError: weights that cannot get to an address; servers that hold the weights of an earlier run; more
            engines than GPUs.
        CaptureError, SyncError: an engine does not start, or does not answer.
    """
    engine = config.generator.inference_engine
    if not engine.pooled:
        with contextlib.ExitStack() as stack:
            with _own_random_states(config):
                llm = stack.enter_context(running_engine(config))
            yield llm
        return
    started = running_servers(config) if not engine.addresses else contextlib.nullcontext(engine.addresses)
    limits = PoolLimits(max_in_flight=engine.max_in_flight, request_timeout_s=engine.request_timeout_s)
    with started as addresses, EnginePool(weight_sync_of(config, addresses), limits) as pool:
        if pool.version or set(pool.engines.values()) != {"serving"}:
            raise ConfigError(
                "generator.inference_engine.addresses: expected servers with the weights that they were started with, "
                f"got version {pool.version} of an earlier run ({pool.engines}). Start them anew for each run"
            )
        yield pool


def weight_sync_of(config: R3Config, engine: Any) -> WeightSync:
    """The sync of the settings, into one engine or a list of them."""
    settings = config.generator.inference_engine
    return WeightSync(
        engine,
        transport=_transport(config),
        delta=settings.weight_sync.delta,
        load_plan=settings.weight_sync.load_plan,
        dtype=getattr(torch, settings.dtype),
        chunk_bytes=int(settings.weight_sync.chunk_mib * 2**20),
        timeout_s=settings.weight_sync.timeout_s,
        on_running=checked_mode(settings.weight_sync.on_running),
        senders="first" if settings.weight_sync.senders == "first" else "all",
        on_lost="remove" if settings.on_engine_lost == "remove" else "raise",
    )


def sync_ranks(transport: str | Transport, *, timeout_s: float = 600.0) -> SyncRanks | None:
    """The job's ranks, for syncs in which each sends its part; None if there is one, or one sends by this transport.

    Every rank calls this.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    name = transport.name if isinstance(transport, Transport) else transport
    return SyncRanks(timeout_s=timeout_s) if several and name in _OVER_NETWORKS else None


def sample(
    config: R3Config,
    engine: Any,
    prompts: Sequence[Sequence[int]],
    spec: RoutingSpec | None,
    *,
    sampling: dict[str, Any],
    version: int | None,
    step: int,
) -> Rollouts:
    """Rollouts of `prompts`, drawn for `step`.

    Args:
        engine: as `running_engines` gives it.
        version: of the weights of a `vllm.LLM`, or None to leave it open; a pool knows its own.
    """
    if isinstance(engine, EnginePool):
        # What an engine samples depends on the request alone: which engine gets it depends on load.
        return engine.generate(prompts, sampling, spec, seed=config.trainer.seed << 31 | step, progress=True)
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    with _own_random_states(config):
        seed_engine(engine, config.trainer.seed, step)
        outputs = engine.generate(inputs, SamplingParams(**sampling), use_tqdm=False)
    return collect(outputs, spec, weight_version=version, sampling_mask=is_truncated(sampling))


def _own_random_states(config: R3Config) -> contextlib.AbstractContextManager[None]:
    """Keeps an engine in this process from the trainer's random numbers, which are then those of other engines."""
    in_process = config.generator.inference_engine.in_process
    return kept_random_states() if in_process else contextlib.nullcontext()


def _transport(config: R3Config) -> str | Transport:
    """By name; with the address by which engines on other hosts reach this one, if there are any."""
    given = config.generator.inference_engine.weight_sync
    far = [address for address in config.generator.inference_engine.addresses if not is_this_machine(address)]
    if given.transport in _OVER_NETWORKS:
        return _OVER_NETWORKS[given.transport](host=given.host or _address_towards(far), port=given.port)
    if given.transport == "files" and given.folder:
        return FilesTransport(given.folder)
    if far:
        raise ConfigError(
            f"generator.inference_engine.weight_sync.transport: expected {' or '.join(_OVER_NETWORKS)}, or files in a "
            f"weight_sync.folder that all hosts see, for an engine that may be on another host ({far[0]}), got "
            f"{given.transport}{' without one' if given.transport == 'files' else ''}"
        )
    return given.transport


def _address_towards(far: Sequence[str]) -> str:
    """Of this machine, by which it reaches the first of these engines."""
    if not far:
        return "127.0.0.1"
    parts = urlsplit(far[0])
    return local_address(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
