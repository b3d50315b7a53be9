"""Engines as Ray actors: each starts one `vllm serve` on the node that Ray chose, and tells its address.

They belong to an attempt of the run: the first trainer rank makes them, and Ray ends them with it. So a run that begins
anew after a loss has engines with the weights that it starts from, whatever became of those before.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from r3.capture import running_servers
from r3.config import R3Config
from r3.errors import CaptureError
from trainer_hooks.engines import running_engines

_LOOK_S = 1.0
_END_S = 40.0  # a server that ends in time needs less

logger = logging.getLogger("r3")


class EngineServer:
    """The actor of one engine. Its server ends with it, in whatever way it ends."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def node(self) -> tuple[str, str]:
        """Id and address of its node, as Ray knows them."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def start(self, config: R3Config, host: str) -> str:
        """Start the server at an address of this node. Returns `http://host:port` when it takes requests.

        Raises:
            CaptureError: it did not start; with the end of its log.
        """
        [address] = self._open.enter_context(running_servers(config, host=host))
        return address

    def stop(self) -> None:
        """End the server, and wait for it: its GPUs are free then."""
        self._open.close()


@contextlib.contextmanager
def engines_on_ray(config: R3Config, group: Any, bundle: dict[str, float]) -> Iterator[Any]:
    """An `EnginePool` over `num_engines` servers, one in each bundle of the placement group.

    Raises:
        CaptureError: an engine has no node within `ray.start_timeout_s`, or its server did not start.
        ConfigError, SyncError: as `running_engines`.
    """
    with _addresses(config, group, bundle) as addresses:
        logger.info("engines on Ray: %s", ", ".join(addresses))
        with running_engines(_with_engines(config, addresses=addresses, num_engines=1)) as pool:
            yield pool


@contextlib.contextmanager
def _addresses(config: R3Config, group: Any, bundle: dict[str, float]) -> Iterator[list[str]]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    one, wait_s = _with_engines(config, num_engines=1), config.ray.start_timeout_s
    server = ray.remote(EngineServer)
    actors = [
        server.options(
            name=f"r3-engine-{number} of {ray.get_runtime_context().get_actor_id()}",
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(config.generator.inference_engine.num_engines)
    ]
    here = ray.get_runtime_context().get_node_id()
    try:
        nodes = _answers([actor.node.remote() for actor in actors], group, wait_s)
        # On this rank's own node by a loopback address: nothing else can reach its control routes then.
        hosts = ["127.0.0.1" if node == here else address for node, address in nodes]
        started = [actor.start.remote(one, host) for actor, host in zip(actors, hosts, strict=True)]
        yield _answers(started, group, wait_s)
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=_END_S)
        for actor in actors:
            ray.kill(actor)


def _answers(calls: Sequence[Any], group: Any, timeout_s: float) -> list[Any]:
    """What the actors answer, or the error of the first that fails, without waiting for the others.

    They may take long, for what they import and load. `timeout_s` is for a node: the group is whole, or soon will be.
    """
    import ray
    from ray.util import placement_group_table

    left, homeless_s = list(calls), 0.0
    while left:
        done, left = ray.wait(left, timeout=_LOOK_S)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            raise CaptureError(f"engine {calls.index(done[0])}: its Ray actor or node has ended: {error}") from error
        homeless_s = 0.0 if done or placement_group_table(group)["state"] == "CREATED" else homeless_s + _LOOK_S
        if homeless_s > timeout_s:
            raise CaptureError(
                f"{len(left)} of {len(calls)} engines have no node after {timeout_s:g} s (ray.start_timeout_s): one "
                "was lost, and no other has room. Add a node, or lower generator.inference_engine.num_engines"
            )
    return ray.get(list(calls))


def _with_engines(config: R3Config, **changes: Any) -> R3Config:
    """The settings of single servers, which know nothing of Ray."""
    engine = dataclasses.replace(config.generator.inference_engine, **changes)
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, inference_engine=engine))
