"""A trainer rank in a process of its own, which syncs with the other one as it is told, and can be held at a point."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from network_hosts import enter_host
from processes import FORKS
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from r3.pool import EnginePool, PoolLimits
from r3.weight_sync import GlooTransport, SyncRanks, WeightSync, combine, digest
from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.sender.rank_part import RankPart
from trainer_hooks import push_from_all_ranks

RANKS = 2
CHUNK_BYTES = 8 << 10
_GROUP_S = 60.0
_ROWS = 8


class RankDiedError(Exception):
    """The process has ended, and gives no answer."""


class RankSettings(NamedTuple):
    """Attributes:
    hosts: address of each rank.
    namespaces: of their hosts; None for this machine's own network.
    port: at which the ranks meet.
    engines: URLs.
    on_lost: as of `WeightSync`.
    timeout_s, entry_timeout_s: of a sync, and of the ranks' coming to it.
    limits: of the pool.
    """

    hosts: Sequence[str]
    namespaces: Sequence[str | None]
    port: int
    engines: Sequence[str]
    on_lost: str
    timeout_s: float
    entry_timeout_s: float
    limits: PoolLimits


class RankProcess:
    """A rank, and what it is asked.

    Attributes:
        held: is given each point at which the rank waits for `go_on`.
    """

    def __init__(self, number: int, settings: RankSettings, held: Callable[[], None]) -> None:
        self._end, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=_run, args=(theirs, number, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._held = held
        self._asked: dict[int, Future] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, what: str, *args: Any) -> Future:
        """Its answer. `RankDiedError` if it has none."""
        answer: Future = Future()
        with self._lock:
            number = len(self._asked)
            self._asked[number] = answer
            try:
                self._end.send((number, what, args))
            except OSError:
                answer.set_exception(RankDiedError(what))
        return answer

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, answer = self._end.recv()
                if number is None:
                    self._held()
                elif isinstance(answer, BaseException):
                    self._asked[number].set_exception(answer)
                else:
                    self._asked[number].set_result(answer)
        self._process.join()
        with self._lock:
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(RankDiedError())


# -- in the process ---------------------------------------------------------------------------------------------------


def whole(name: str) -> dict[str, torch.Tensor]:
    """A set of weights, by its name: A, B or C."""
    number = "ABC".index(name) + 1
    of = torch.Generator().manual_seed(number)
    layers = {f"layers.{at}.weight": torch.randn(_ROWS, 128, generator=of) for at in range(6)}
    return {"number": torch.tensor([float(number)])} | layers


def digest_of(name: str) -> int:
    return combine({name: digest(tensor) for name, tensor in whole(name).items()})


class _Rank:
    def __init__(self, end: Connection, number: int, settings: RankSettings) -> None:
        self._end, self._sending, self._number = end, threading.Lock(), number
        self._hold, self._go = "", threading.Event()
        self._settings = settings
        self._pool: EnginePool | None = None

    def serve(self) -> None:
        while True:
            number, what, args = self._end.recv()
            if what == "go on":
                self._go.set()
                continue
            threading.Thread(target=self._do, args=(number, what, args), daemon=True).start()

    def _do(self, number: int, what: str, args: tuple) -> None:
        try:
            answer = getattr(self, what)(*args)
        except Exception as error:
            answer = error if type(error).__module__.startswith("r3") else RuntimeError(f"{type(error)}: {error}")
        with self._sending:
            self._end.send((number, answer))

    # -- what it is asked

    def begin(self) -> None:
        its = self._settings
        meet = f"tcp://{its.hosts[0]}:{its.port}"
        limit = timedelta(seconds=_GROUP_S)
        dist.init_process_group("gloo", init_method=meet, rank=self._number, world_size=RANKS, timeout=limit)
        mesh = init_device_mesh("cpu", (RANKS,))
        self._weights = {}
        for name in "ABC":
            rows = slice(self._number * _ROWS // RANKS, (self._number + 1) * _ROWS // RANKS)
            self._weights[name] = [
                (key, tensor if key == "number" else DTensor.from_local(tensor[rows], mesh, [Shard(0)]))
                for key, tensor in whole(name).items()
            ]
        self._ranks = SyncRanks(timeout_s=its.entry_timeout_s)
        if self._number == 0:
            transport = GlooTransport(host=its.hosts[0])
            sync = WeightSync(
                [*its.engines],
                transport=transport,
                on_lost=its.on_lost,
                timeout_s=its.timeout_s,
                chunk_bytes=CHUNK_BYTES,
            )
            self._pool = EnginePool(sync, its.limits)

    def push(self, name: str, version: int) -> tuple[int, int] | None:
        """Where this rank drives, the workers that committed, and the engines."""
        receipt = push_from_all_ranks(self._pool, self._weights[name], version, None, ranks=self._ranks)
        return None if receipt is None else (receipt.workers, len(self._pool.sync.engines))

    def generate(self, *args: Any) -> list[tuple]:
        assert self._pool is not None
        found = self._pool.generate(*args)
        return [(i.prompt_index, i.weight_versions, i.finish_reason, i.token_ids, i.engine) for i in found]

    def join(self, url: str) -> None:
        assert self._pool is not None
        self._pool.join(url)

    def leave(self, url: str) -> None:
        assert self._pool is not None
        self._pool.leave(url)

    def state(self) -> dict[str, Any]:
        assert self._pool is not None
        pool = self._pool
        return {"engines": pool.engines, "counts": pool.counts, "version": pool.version} | {
            "poisoned": pool.sync.poisoned
        }

    # -- points at which it is held

    def hold(self, point: str) -> None:
        self._hold = point
        self._go.clear()

    def at(self, point: str) -> None:
        if not point or point != self._hold:
            return
        self._hold = ""
        with self._sending:
            self._end.send((None, point))
        self._go.wait(_GROUP_S)

    def watch(self) -> None:
        tell, end, order = Orders.tell, Orders.end, RankPart._order

        def told(orders: Orders, what: str, **more: Any) -> None:
            self.at(what)
            tell(orders, what, **more)

        def ended(orders: Orders, error: BaseException | None) -> None:
            self.at("end" if error is None else "")
            end(orders, error)

        def ordered(part: RankPart) -> dict[str, Any]:
            message = order(part)
            self.at(message["do"])
            return message

        Orders.tell, Orders.end, RankPart._order = told, ended, ordered
        from r3.weight_sync.engines.vllm_serve import ServerEngine

        replies = ServerEngine.replies

        def asked(engine: ServerEngine, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
            self.at(method)
            return replies(engine, method, args, timeout_s)

        ServerEngine.replies = asked


def _run(end: Connection, number: int, settings: RankSettings) -> None:
    torch.set_num_threads(1)
    namespace = settings.namespaces[number]
    if namespace is not None:
        enter_host(namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    rank = _Rank(end, number, settings)
    rank.watch()
    with contextlib.suppress(EOFError):  # of the process that started this one
        rank.serve()
    os._exit(0)
