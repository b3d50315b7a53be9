"""The trainer's side of a sync: `WeightSync(engine).push(named_tensors, version=...)`."""

import contextlib
import copy
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from r3.errors import EngineLostError, SyncError, summary
from r3.weight_sync.delta import DeltaBase
from r3.weight_sync.engines import Engine, RunningRequests, engine_of
from r3.weight_sync.integrity.digest import combine
from r3.weight_sync.protocol import Reply
from r3.weight_sync.sender.calls import (
    ParallelCalls,
    draft_of,
    kept_layers_of,
    require_equal,
    require_found,
    worker_name,
)
from r3.weight_sync.sender.chunking import OutgoingWeights
from r3.weight_sync.sender.engine_group import EngineGroup, OnLost, require_names
from r3.weight_sync.sender.orders import Orders
from r3.weight_sync.sender.progress import SyncProgress
from r3.weight_sync.sender.ranks import SyncRanks
from r3.weight_sync.sender.ranks_transport import RanksTransport
from r3.weight_sync.sender.receipt import SyncReceipt
from r3.weight_sync.sender.sending import ChunkSender
from r3.weight_sync.states import SyncState
from r3.weight_sync.transports import Transport, transport_of
from r3.weight_sync.weights.lazy import Weight

Senders = Literal["all", "first"]

_ABORT_S = 15.0
_IDLE_PAUSES_S = 5e-3  # within this, an engine that generates nothing has paused


class WeightSync:
    """Weight syncs into running engines, each of which commits on every worker of every engine or raises.

    Args:
        engine: a `vllm.LLM`, an `AsyncLLM`, the URL of a `vllm serve`, an `Engine`, or several of these. All run with
            `worker_extension_cls=r3.weight_sync.WORKER_EXTENSION`.
        on_running: what becomes of requests that run when a sync begins: `wait`, `abort` or `keep` (see `engine_of`).
        transport: a `Transport`, or the name of one: files, gloo, nccl, ipc, in_process. None: in_process where the
            workers are in this process (an LLM that an external launcher started, or whose engine core is), else files.
        delta: send only what changed since the last acknowledged version. Trainer and each worker then keep a copy of
            the weights in main memory. The first sync, and any after a failure, is complete.
        dtype: 16-, 32- and 64-bit floating-point tensors are sent in this dtype (the engine's), None to send all as
            they are. A `LazyWeight` says for itself.
        chunk_bytes: largest chunk; one tensor that is larger is a chunk of its own. Eight times as much where it takes
            no memory: zero-copy weights that workers on the same GPU read in place (`ipc`).
        timeout_s: longest wait for any one answer of an engine. Also how long a sync may be silent before another
            sender may take over from it.
        load_plan: have workers copy weights as the first sync proved that vLLM's loaders do. Off, every sync goes
            through the loaders, like the first one, and takes as long.
        on_lost: what becomes of a sync in which an engine dies or does not answer: "raise" an error, as for any other
            failure, or "remove" that engine, with a warning, where others are left. Before any worker has committed,
            `push` then raises `EngineLostError`: the same push again commits on the rest. From the commit on it goes on
            with the rest by itself.
        engine_constants: patterns (`*.impl.table`) of tensors of the engine that do not derive from weights, though a
            sync took them for such and refused: it names them.
        senders: of the ranks that push together (`push(ranks=...)`): "all" send a part each, if the transport can
            (`gloo`, `nccl`) and no delta is sent; or only the "first", which pushes.

    Raises:
        SyncError: an engine has no such extension, or a worker does not answer.

    Example:
        >>> from r3.weight_sync import named_weights
        >>> sync = WeightSync(llm, dtype=torch.bfloat16)
        >>> receipt = sync.push(named_weights(model), version=(sync.version or 0) + 1)
        >>> receipt.version == sync.version
        True
    """

    def __init__(
        self,
        engine: Any | Sequence[Any],
        *,
        on_running: RunningRequests = "wait",
        transport: str | Transport | None = None,
        delta: bool = False,
        dtype: torch.dtype | None = None,
        chunk_bytes: int = 512 << 20,
        timeout_s: float = 600.0,
        load_plan: bool = True,
        on_lost: OnLost = "raise",
        engine_constants: Sequence[str] = (),
        senders: Senders = "all",
    ) -> None:
        if senders not in get_args(Senders):
            raise SyncError(f"senders: expected one of {', '.join(get_args(Senders))}, got {senders!r}")
        if on_lost not in get_args(OnLost):
            raise SyncError(f"on_lost: expected one of {', '.join(get_args(OnLost))}, got {on_lost!r}")
        if chunk_bytes <= 0 or timeout_s <= 0:
            raise SyncError(f"expected chunk_bytes and timeout_s above 0, got {chunk_bytes} and {timeout_s}")
        self._on_running = on_running
        replicas = engine if isinstance(engine, list | tuple) else [engine]
        if not replicas:
            raise SyncError("engine: expected at least one, got an empty list")
        self._group = EngineGroup(
            [engine_of(replica, on_running=on_running) for replica in replicas], timeout_s, on_lost
        )
        if transport is None:
            transport = "in_process" if all(each.in_this_process for each in self.engines) else "files"
        self._transport = transport_of(transport)
        self._transport.timeout_s = timeout_s
        self._base = DeltaBase() if delta else None
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._load_plan = load_plan
        self._senders = senders
        self._engine_constants = list(engine_constants)
        self._digest: int | None = None  # what must be sent
        self._sender = f"process {os.getpid()} on {socket.gethostname()}"
        self.poisoned: str | None = None
        """Why the engines' weights cannot be trusted until the next sync commits; None if they can."""
        status = self._group.call("r3_status")
        versions = {reply["version"] for reply in status}
        self.version: int | None = versions.pop() if len(versions) == 1 else None
        """The version that every worker committed last; None before the first sync, and where workers differ."""
        causes = [f"{worker_name(reply)}: {reply['cause']}" for reply in status if reply["state"] == SyncState.POISONED]
        if causes:
            self.poisoned = f"before this sender: {causes[0]}"

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The adapters of the engines, in the order given."""
        return self._group.engines

    @property
    def lost(self) -> dict[str, str]:
        """Name of each engine that the last push removed, and why."""
        return self._group.lost

    @property
    def standing(self) -> set[str]:
        """Names of engines that may stand still: the last sync was given up before any weight went out, and they did
        not say that they know."""
        return self._group.standing

    @property
    def removes_lost(self) -> bool:
        """Whether engines that die are removed (`on_lost="remove"`)."""
        return self._group.removes_lost

    def add(self, engine: Any) -> Engine:
        """Let another engine take part from the next push on, which then commits on it too. Not during a push.

        Returns:
            Its adapter.

        Raises:
            SyncError: it has no worker extension, or does not answer; it is not added then.
        """
        adapter = engine_of(engine, on_running=self._on_running)
        adapter.call("r3_status", timeout_s=self._timeout_s)
        self._group.add(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Leave the engine of that name out from here on. Not during a push. It goes on as it is.

        Raises:
            SyncError: no engine has this name, or it is the only one.
        """
        engine = require_names(self.engines, name)
        if len(self.engines) == 1:
            raise SyncError(f"{name} is the only engine: a sync without engines has no meaning")
        self._group.remove(engine)
        engine.close()

    def push(
        self,
        named_tensors: Iterable[tuple[str, Weight]],
        *,
        version: int,
        frozen: Sequence[str] = (),
        agree: Callable[[], Any] | None = None,
        ranks: SyncRanks | None = None,
    ) -> SyncReceipt:
        """Send all weights, but for what is `frozen`, and commit them as `version`.

        Args:
            named_tensors: the whole checkpoint, by Hugging Face names (`named_weights`). A sharded tensor (DTensor) is
                gathered when its chunk is sent: the other ranks of its mesh call `ranks.take_part`, or without `ranks`
                `gather_all`, meanwhile. The tensors must not change before this returns.
            version: above every version committed before.
            frozen: module paths of the checkpoint (`["model.visual"]`) below which the engine keeps what it has; what
                `named_tensors` has there is not sent. All else must be complete.
            agree: called when all workers hold all weights, before any commits; an exception from it aborts the sync.
                Ranks that gather together use it to agree that all have succeeded.
            ranks: of the trainer: each sends a part (`senders`), and no rank gathers more than it sends.

        Raises:
            SyncError: the sync did not commit everywhere; says which worker and why. The engines are then poisoned
                (`self.poisoned`) and serve nothing, unless the sync was refused before it touched a weight.
            EngineLostError: the same, and what failed were engines that have been removed (`on_lost="remove"`).
        """
        self._group.lost, self._group.standing = {}, set()
        settings: dict[str, Any] = {"dtype": self._dtype, "chunk_bytes": self._chunk_bytes, "frozen": frozen}
        if ranks is not None:
            recipe = self._transport.recipe()
            several = recipe if self._senders == "all" and self._base is None else None
            with ranks.driving(recipe, self._timeout_s) as orders:
                outgoing = orders.begin([*named_tensors], settings, several)
                transport = RanksTransport(self._transport, orders, range(ranks.size) if several else [ranks.number])
                return self._push(outgoing, version, agree or (lambda: None), transport, orders)
        outgoing = OutgoingWeights(named_tensors, **settings)
        try:
            return self._push(outgoing, version, agree or (lambda: None), self._transport)
        except Exception:
            # Whatever failed here, the other ranks gather all sharded tensors: they must not wait for this rank.
            with contextlib.suppress(Exception):
                outgoing.gather_rest()
            raise

    def push_to(
        self, names: Sequence[str], named_tensors: Iterable[tuple[str, Weight]], *, like: SyncReceipt
    ) -> SyncReceipt:
        """Commit what the last push committed on engines that were added since. The others go on.

        Args:
            names: of these engines.
            named_tensors: the weights of that push, unchanged.
            like: its receipt.

        Raises:
            SyncError: it did not commit on all of them, or these are other weights. The other engines are not touched.
        """
        part = copy.copy(self)
        part._group = EngineGroup([require_names(self.engines, name) for name in names], self._timeout_s)
        part._base, part.poisoned, part._digest = None, None, like.digest
        return part.push(named_tensors, version=like.version, frozen=like.frozen)

    def require_committed(self) -> None:
        """Raise `SyncError` if the engines' weights cannot be trusted: call before every rollout."""
        if self.poisoned is not None:
            raise SyncError(
                f"the engine holds half-loaded weights since a sync failed ({self.poisoned}); only a complete sync "
                "that commits makes it usable again"
            )

    def close(self) -> None:
        """Release the resources of the transport and the engine adapters. The engines keep running."""
        self._transport.close()
        for engine in self.engines:
            engine.close()

    def _push(
        self,
        outgoing: OutgoingWeights,
        version: int,
        agree: Callable[[], Any],
        transport: Transport,
        orders: Orders | None = None,
    ) -> SyncReceipt:
        manifest = outgoing.manifest()
        transport.zero_copy_names = outgoing.zero_copy_names
        sync_id = uuid.uuid4().hex[:12]
        progress = SyncProgress()
        clock = progress.clock
        try:
            # Reserve first: no two senders may pause and resume one engine at the same time.
            reserving = self._group.start("r3_reserve", sync_id, version, self._sender, self._timeout_s)
            resident = outgoing.gpu_resident()
            with clock.stage("pause"):
                progress.digest_while([reserving], resident)
                status = reserving.result()
                self._pause(progress, resident)
            with clock.stage("begin"):
                complete, beginning = self._begin(sync_id, status, manifest, outgoing.frozen, transport)
                progress.digest_while(beginning, resident)
            sender = ChunkSender(sync_id, self._group, transport, self._base, progress)
            if orders is None:
                sender.send(beginning, outgoing.rounds(sender.takes_memory))
            else:
                sender.send(beginning, orders.rounds(outgoing.rounds(sender.takes_memory, orders.gather)))
            with clock.stage("seal"):
                if orders is not None:
                    orders.collect(progress)
                total = self._seal(sync_id, progress, transport)
                agree()
            with clock.stage("commit"):
                until = time.monotonic() + self._timeout_s / 2  # well within the lease, which the commit begins anew
                progress.committing = True
                answers = self._group.commit(sync_id)
                require_equal(answers, version, total)
                self.version = version
                if self._base is not None:
                    self._base.version = version
            with clock.stage("resume"):
                self._group.serve(sync_id, version, until)
                if orders is not None:
                    orders.committed(version)
        except BaseException as error:
            transport.abort()
            self._abort(sync_id, progress, error)
            if self.lost and not progress.committing and isinstance(error, SyncError):
                raise EngineLostError(
                    f"{', '.join(self.lost)} did not answer and takes no part any more. No engine has committed "
                    f"version {version}; push it again, to the {len(self.engines)} that are left. {error}"
                ) from error
            raise
        self.poisoned = None
        left = {engine.name for engine in self.engines}
        return SyncReceipt(
            version=version,
            digest=total,
            workers=sum(answer["engine"] in left for answer in answers),
            tensors=len(manifest),
            chunks=progress.chunks,
            bytes=progress.bytes,
            sent_bytes=progress.sent_bytes,
            complete=complete,
            draft_model=draft_of(beginning[1].result()),
            frozen=outgoing.frozen,
            kept=kept_layers_of(beginning[1].result()),
            seconds=clock.total_s(),
            stages_s=clock.stages_s,
            worker_stages_s=progress.worker_stages_s,
        )

    def _begin(
        self,
        sync_id: str,
        status: list[Reply],
        manifest: dict[str, list],
        frozen: tuple[str, ...],
        transport: Transport,
    ) -> tuple[bool, list[ParallelCalls]]:
        """Open the sync on all workers. Returns whether it is complete, and the calls to wait for."""
        base_version = None if self._base is None else self._base.version
        # If one worker lacks the base, perhaps after a restart, all workers get a complete sync.
        if any(reply["base_version"] != base_version or reply["cause"] for reply in status):
            base_version = None
        if self._base is not None:
            self._base.begin(complete=base_version is None)
        transport.worker_gpus = {reply["gpu"] for reply in status}
        offer = transport.offer(len(status), {reply["connection_id"] for reply in status})
        sync = {
            "timeout_s": self._timeout_s,
            "offer": offer,
            "ranks": {reply["worker"]: number for number, reply in enumerate(status)},
            "manifest": manifest,
            "frozen": frozen,
            "keep_base": self._base is not None,
            "base_version": base_version,
            "load_plan": self._load_plan,
            "constants": self._engine_constants,
        }
        # The workers run no batch from here to the commit: caches that are emptied now stay empty.
        call = self._group.start(
            "r3_begin",
            sync_id,
            sync,
            then=lambda engine: engine.reset_caches(self._timeout_s),
            check=partial(require_found, frozen),
        )
        join = ParallelCalls([lambda: transport.join(call.failed)])
        return base_version is None, [join, call]

    def _seal(self, sync_id: str, progress: SyncProgress, transport: Transport) -> int:
        broken = [*progress.digests.not_finite(), *progress.not_finite]
        if broken:
            raise SyncError(f"{len(broken)} tensors hold NaN or infinity:{summary(broken)}")
        transport.flush(lambda: False)
        sealing = self._group.start("r3_seal", sync_id, progress.named)
        total = combine(progress.named)
        if self._digest not in (None, total):
            raise SyncError(
                f"expected the weights of the last push, with digest {self._digest}, got others, with {total}: they "
                "have changed since; push them to all engines"
            )
        answers = sealing.result()
        transport.release(progress.chunks)
        for answer in answers:
            for stage, seconds in answer.get("stages_s", {}).items():
                progress.worker_stages_s[stage] = max(seconds, progress.worker_stages_s.get(stage, 0.0))
        wrong = [f"{worker_name(a)}: {a.get('digest')}" for a in answers if a.get("digest") != total]
        if wrong:
            raise SyncError(f"expected digest {total} on every worker, got:{summary(wrong)}")
        return total

    def _abort(self, sync_id: str, progress: SyncProgress, error: BaseException) -> None:
        cause = f"{type(error).__name__}: {error}"
        limit_s = min(_ABORT_S, self._timeout_s)
        untouched = self._group.abort(sync_id, cause, limit_s, error)
        if not progress.chunks and self.poisoned is None:
            # No weight was touched: resume the engines that were serving, but for those that another sender holds now,
            # who will resume them, and those that do not say.
            self._group.resume([engine for engine in progress.served if engine in untouched], limit_s, error)
            for engine in (each for each in self.engines if each not in untouched):
                self._group.standing.add(engine.name)
                engine.refuse(f"it may stand still since a sync was given up ({cause}); a sync that commits heals it")
            return
        self.poisoned = self.poisoned or cause
        for engine in self.engines:
            engine.refuse(f"its weights cannot be trusted since a sync failed ({cause}); a complete sync heals it")

    def _pause(self, progress: SyncProgress, resident: Iterator[tuple[str, Tensor]]) -> None:
        calls = self._group.pausing(progress.served)
        try:
            if not calls.wait(_IDLE_PAUSES_S, all_of_them=True):
                progress.digest_while([calls], resident)  # while they end what they generate
        finally:
            calls.wait(2 * self._timeout_s, all_of_them=True)  # of those that were paused, none may be forgotten
        calls.result()
