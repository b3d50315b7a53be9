"""The Ray cluster: joined or started, and whether it has room for what the settings ask."""

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r3.config import R3Config, variables
from r3.errors import ConfigError, summary

ADDRESS = "RAY_ADDRESS"
_CONNECT_S = 10.0
_TRANSPORTS = ("gloo", "nccl")  # over any network


@dataclass(frozen=True)
class Node:
    """A live node: its id, address and resources (`CPU`, `GPU`, ...) as Ray knows them."""

    id: str
    address: str
    resources: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.address}: {self.resources.get('CPU', 0):g} CPUs, {self.resources.get('GPU', 0):g} GPUs"


@dataclass(frozen=True)
class Needs:
    """What Ray sets aside for a trainer rank and for an engine, and how many there are of each."""

    workers: int
    worker: Mapping[str, float]
    engines: int
    engine: Mapping[str, float]

    @classmethod
    def of(cls, config: R3Config, nodes: Sequence[Node]) -> "Needs":
        """On GPUs, if any node has some."""
        engine, ray = config.generator.inference_engine, config.ray
        gpus = any(node.resources.get("GPU") for node in nodes)
        size = engine.tensor_parallel_size * engine.pipeline_parallel_size
        return cls(
            workers=ray.num_workers,
            worker={"CPU": ray.cpus_per_worker} | ({"GPU": 1.0} if gpus else {}),
            engines=engine.num_engines,
            engine={"CPU": ray.cpus_per_engine} | ({"GPU": float(size)} if gpus else {}),
        )

    def require_room(self, nodes: Sequence[Node]) -> None:
        """Raise unless `nodes` have room for all of it, were they idle.

        Raises:
            ConfigError: they have not, and never will: Ray would wait for ever.
        """
        free = [dict(node.resources) for node in nodes]
        # Engines first: one of several GPUs needs them on one node, ranks take what is left.
        if _placed(free, self.engine, self.engines) and _placed(free, self.worker, self.workers):
            return
        raise ConfigError(
            f"ray: expected a cluster with room for engines, {self.engines} of {_words(self.engine)} on one node each, "
            f"and trainer ranks, {self.workers} of {_words(self.worker)}; got {len(nodes)} nodes:"
            f"{summary(map(str, nodes))}\n"
            "start more nodes (ray start --address=...), or lower ray.num_workers, ray.cpus_per_worker, "
            "ray.cpus_per_engine, generator.inference_engine.num_engines or its tensor_parallel_size"
        )


def _placed(free: list[dict[str, float]], bundle: Mapping[str, float], count: int) -> bool:
    """Takes `count` bundles from what is `free` on each node, as many as fit from each node in turn."""
    for node in free:
        while count and all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] = node.get(name, 0.0) - amount
            count -= 1
    return not count


def _words(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())


@contextlib.contextmanager
def joined_cluster(address: str | None) -> Iterator[list[Node]]:
    """The live nodes of the cluster at `address`, or that Ray finds, or of one that is started here and ends here.

    Raises:
        ConfigError: Ray is not installed; no cluster answers at `address`; or it is a Ray client's address.
    """
    given = address or variables([ADDRESS]).get(ADDRESS, "")
    if given.startswith("ray://"):
        raise ConfigError(
            f"{ADDRESS}: expected the address of a node of the cluster (host:6379, or auto on such a node), got "
            f"{given}: Ray Train does not run from a Ray client. Submit the command with `ray job submit`"
        )
    ray = require_ray()
    own = not ray.is_initialized()
    if own:
        try:
            _require_listener(given)
            ray.init(address=address)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {given or 'auto'}: {error}. Expected host:port of its head, as `ray start "
                "--head` prints it, auto, or local"
            ) from error
    try:
        yield [
            Node(each["NodeID"], each["NodeManagerAddress"], each["Resources"]) for each in ray.nodes() if each["Alive"]
        ]
    finally:
        if own:
            ray.shutdown()


def _require_listener(given: str) -> None:
    """Raise `OSError` where nothing listens: Ray itself asks for minutes on end."""
    host, _, port = given.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def require_ray() -> Any:
    """The module `ray`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise ConfigError(
            f"a run on Ray needs it, with Ray Train ({error}): pip install 'moe-routing-replay[ray]', on all nodes"
        ) from error
    return ray


def require_transport(config: R3Config, nodes: Sequence[Node]) -> None:
    """Raise unless weights can get from a trainer rank to an engine on another node.

    Raises:
        ConfigError: they cannot.
    """
    sync = config.generator.inference_engine.weight_sync
    files = sync.transport == "files" and (sync.folder or len(nodes) == 1)
    if sync.transport not in _TRANSPORTS and not files:
        raise ConfigError(
            f"generator.inference_engine.weight_sync.transport: expected {' or '.join(_TRANSPORTS)}, or files in a "
            f"weight_sync.folder that all nodes see, on a Ray cluster of {len(nodes)} nodes, where ranks and engines "
            f"have GPUs of their own; got {sync.transport}"
        )
