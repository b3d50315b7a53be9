"""The worker's side of a sync: `LLM(worker_extension_cls="r3.weight_sync.worker.WeightSyncWorker")`.

vLLM appends the class to its worker's bases: no `__init__` runs, every name starts with `r3_`, and what comes and goes
is plain dictionaries, of which JSON is enough. A call never raises into the engine; it answers {"error": ...}, and the
worker is poisoned if a weight may have been touched.

`r3.weight_sync.states` has the calls and the states they lead to.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from r3.errors import summary
from r3.vllm_compat.engines import allow_amx, memory_asleep
from r3.weight_sync.delta import DeltaBase
from r3.weight_sync.integrity.digest import combine
from r3.weight_sync.protocol import Reply
from r3.weight_sync.states import SyncState
from r3.weight_sync.transports import RECEIVERS, Announced, Descriptor, Receiver
from r3.weight_sync.transports.transport import gpu_uuid, wait_until
from r3.weight_sync.worker.batch_guard import BatchGuard
from r3.weight_sync.worker.derived_tensors import watch_construction
from r3.weight_sync.worker.engine_models import EngineModels, caches_in
from r3.weight_sync.worker.finite import queue_finite_check
from r3.weight_sync.worker.kept_layers import kept_layers
from r3.weight_sync.worker.received_sync import ReceivedSync, WorkerState
from r3.weight_sync.worker.verification import check_chunk, check_content, check_ties, remedy

# This module is imported in every worker, before it builds a model.
allow_amx()
watch_construction()


class _RefusedError(RuntimeError):
    """A call that was refused before it touched a weight: the worker's state is unchanged."""


class WeightSyncWorker:
    """Mixed into vLLM's worker, which has these."""

    rank: int
    vllm_config: Any
    model_runner: Any  # has the device: CPU workers of 0.22 have none themselves

    def r3_status(self) -> Reply:
        """State, cause if poisoned, and what a sender needs to know of this worker."""
        return self._r3_reply(lambda state: {})

    def r3_seed(self, seed: int) -> None:
        """Sample on as an engine that was started with `seed`. No part of a sync: vLLM takes one extension only."""
        torch.manual_seed(seed)

    def r3_reserve(self, sync_id: str, version: int, sender: str, lease_s: float) -> Reply:
        """Keep this worker for one sync. Nothing is touched yet.

        Args:
            sender: in words.
            lease_s: how long the sender may be silent before another may take over.
        """

        def reserve(state: WorkerState) -> Reply:
            if sync_id == state.given_up:
                raise _RefusedError(f"sync {sync_id} was given up before this came")
            if state.sync is not None:
                left_s = state.sync.until - time.monotonic()
                if left_s > 0:
                    raise _RefusedError(
                        f"a sync of version {state.sync.version} by {state.sync.sender} is {state.state}: let it "
                        f"commit or abort; if its sender has died, another can begin in {left_s:.1f} s"
                    )
                cause = f"its sender, {state.sync.sender}, was silent for more than {state.sync.lease_s:g} s"
                self._r3_give_up(state, cause)
            if state.version is not None and version <= state.version:
                raise _RefusedError(f"expected a version above {state.version}, got {version}")
            state.sync = ReceivedSync(id=sync_id, version=version, sender=sender, lease_s=lease_s)
            state.sync.renew()
            return {}

        return self._r3_reply(reserve)

    def r3_begin(self, sync_id: str, sync: dict[str, Any]) -> Reply:
        """Open the bracket, and join the trainer. Heals a poisoned worker if the sync commits.

        Args:
            sync: timeout_s, offer (of the transport), ranks (number of each worker among all, by the name it gives
                itself), manifest (name -> [shape, dtype]), frozen (module paths that it leaves out), keep_base,
                base_version (None: complete), load_plan (whether to use one), constants (of `DerivedTensors`).

        Answers `kept`: by path of `frozen`, the layers that keep what they have.
        """
        return self._r3_reply(lambda state: self._r3_open(state, self._r3_of(state, sync_id, SyncState.RESERVED), sync))

    def r3_load(self, sync_id: str, index: int, chunks: list[Announced]) -> Reply:
        """Receive and load `chunks`, the first of which is number `index` of the sync. The last one finishes loading.

        On a GPU loading is queued when this answers. The answer says that no chunk before `index` is needed any more.
        """

        def load(state: WorkerState) -> Reply:
            sync = self._r3_of(state, sync_id, SyncState.OPEN)
            if index != sync.chunks:
                raise RuntimeError(f"expected chunk {sync.chunks}, got {index}: one was lost, doubled or reordered")
            assert state.receiver is not None
            for number, (names, where) in enumerate(chunks, 1):
                if number == len(chunks) and state.receiver.takes_memory:
                    self._r3_wait_for_the_call_before(sync)
                self._r3_load_one(sync, state.receiver, names, where)
            if len(sync.received) == len(sync.manifest):
                self._r3_finish(sync, state.receiver)
            self._r3_wait_for_the_call_before(sync)
            state.receiver.release(index)
            if self.model_runner.device.type == "cuda":
                sync.loaded = torch.cuda.current_stream(self.model_runner.device).record_event()
            return {}

        return self._r3_reply(load)

    def r3_seal(self, sync_id: str, digests: dict[str, int]) -> Reply:
        """Check that every tensor has arrived as it was sent. Answers the digest of all of them."""

        def seal(state: WorkerState) -> Reply:
            sync = self._r3_of(state, sync_id, SyncState.OPEN)
            assert state.receiver is not None
            unsent = sorted(sync.manifest.keys() - sync.received)
            if unsent:
                raise RuntimeError(f"{len(unsent)} tensors of the manifest have not come: {unsent[:16]}")
            sealed = combine(digests)
            with sync.clock.stage("settle"):
                check_content(sync, digests)
                check_ties(sync, digests)
                if wrong := sync.uninitialised():
                    raise RuntimeError(
                        f"{len(wrong)} tensors of the engine were left uninitialised: {'; '.join(wrong[:16])}"
                    )
                # A KV cache that is asleep has no memory: it gets new memory when it wakes.
                if state.cause and "kv_cache" not in self._r3_asleep():
                    _zero(self.model_runner.kv_caches)
                if self.model_runner.device.type == "cuda":
                    torch.cuda.synchronize(self.model_runner.device)
                state.receiver.flush()
            sync.sealed, sync.state = sealed, SyncState.SEALED
            return {"digest": sync.sealed, "stages_s": sync.clock.stages_s}

        return self._r3_reply(seal)

    def r3_commit(self, sync_id: str) -> Reply:
        """Commit the sealed weights. The worker stays reserved until `r3_release`."""

        def commit(state: WorkerState) -> Reply:
            sync = self._r3_of(state, sync_id, SyncState.SEALED)
            assert sync.reload is not None
            state.version, state.cause, sync.state = sync.version, "", SyncState.COMMITTED
            sync.reload.commit()
            if sync.base is not None:
                sync.base.version = sync.version
            return {"digest": sync.sealed}

        return self._r3_reply(commit)

    def r3_release(self, sync_id: str) -> Reply:
        """End the sync: another sender may reserve this worker."""

        def release(state: WorkerState) -> Reply:
            self._r3_of(state, sync_id, SyncState.COMMITTED)
            state.sync = None
            return {}

        return self._r3_reply(release)

    def r3_abort(self, sync_id: str, cause: str) -> Reply:
        """Abort the sync, also one whose reservation arrives later: calls of a sender that ends early may cross.

        The worker is poisoned, unless no weight was touched.
        """

        def abort(state: WorkerState) -> Reply:
            state.given_up = sync_id
            if state.sync is not None and state.sync.id == sync_id:
                self._r3_give_up(state, cause)
            return {}

        return self._r3_reply(abort)

    def _r3_asleep(self) -> set[str]:
        # vLLM keeps it for the whole process, in which there may be another engine.
        return memory_asleep() if self.vllm_config.model_config.enable_sleep_mode else set()

    def _r3_open(self, state: WorkerState, sync: ReceivedSync, request: dict[str, Any]) -> Reply:
        offer, complete = request["offer"], request["base_version"] is None
        if "weights" in self._r3_asleep():
            raise _RefusedError(
                "the engine's weights are asleep (sleep mode), and nothing can be copied into them: wake them before "
                'the sync, llm.wake_up(tags=["weights"]); the KV cache may stay asleep'
            )
        if self.vllm_config.parallel_config.enable_eplb:
            # Seen with vLLM 0.26 on two GPUs: committed, and the weights of 30% of the choices were other experts'.
            raise _RefusedError(
                "enable_eplb: expected experts that stay where they are, got expert load balancing: vLLM reloads "
                "weights to where experts were at the start. Start the engine without it"
            )
        if offer["transport"] not in RECEIVERS:
            raise _RefusedError(f"expected a transport of {sorted(RECEIVERS)}, got {offer['transport']!r}")
        base = state.base if request["keep_base"] else None
        if not complete and (base is None or base.version != request["base_version"] or state.cause):
            raise _RefusedError(f"this worker has no base of version {request['base_version']}: send a complete sync")
        self._r3_check_quantization(request["manifest"])
        kept = self._r3_kept(state, request)
        sync.kept = frozenset(layer for layers in kept.values() for layer in layers)
        sync.manifest = {name: (tuple(shape), dtype) for name, (shape, dtype) in request["manifest"].items()}
        if state.models is None:
            state.models = EngineModels.of(self.model_runner, self.vllm_config)
        sync.reload = state.models.bracket(kept=sync.kept, constants=request["constants"], planned=request["load_plan"])
        if misfits := sync.reload.misfits(sync.manifest):
            raise _RefusedError(
                f"what is sent does not fit the engine, of which no weight was touched:{summary(misfits)}"
                + remedy(misfits, sync.manifest)
            )
        if request["keep_base"]:
            base = base or DeltaBase()
            base.begin(complete)
        sync.base = state.base = base
        self._r3_join(state, request)
        if not isinstance(self.model_runner.execute_model, BatchGuard):
            BatchGuard(self.model_runner, lambda: state.why_no_batch)
        sync.state = SyncState.OPEN
        sync.reload.begin(sync.manifest)
        sync.renew()
        return {"draft": state.models.draft, "kept": kept}

    def _r3_kept(self, state: WorkerState, request: dict[str, Any]) -> dict[str, list[str]]:
        try:
            kept = kept_layers(self.model_runner.model, request["frozen"], request["manifest"])
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        if state.cause:
            half_loaded = {layer for layers in kept.values() for layer in layers} - state.untouched
            if half_loaded:
                raise _RefusedError(
                    f"layers to be kept may be half-loaded since a sync failed ({state.cause}): push once without "
                    f"frozen={list(request['frozen'])}, or start the engine anew:{summary(sorted(half_loaded))}"
                )
        return kept

    def _r3_join(self, state: WorkerState, sync: dict[str, Any]) -> None:
        offer = sync["offer"]
        connection_id = offer.get("connection_id")
        if state.receiver is not None and connection_id is not None and state.receiver.connection_id == connection_id:
            return
        _drop_receiver(state)
        rank = sync["ranks"].get(state.worker)
        if rank is None:
            raise _RefusedError("this worker was started after the sync asked who is there: push again")
        try:
            state.receiver = RECEIVERS[offer["transport"]](offer, rank, self.model_runner.device, sync["timeout_s"])
        except Exception as error:
            raise _RefusedError(f"{type(error).__name__}: {error}") from error

    def _r3_load_one(self, sync: ReceivedSync, receiver: Receiver, names: list[str], where: Descriptor) -> None:
        assert sync.reload is not None
        with sync.clock.stage("receive"):
            chunk = receiver.receive(where)
            if sync.base is not None or not sync.reload.only_copies:
                # What follows may wait for the device, and would without end where the other side has died.
                receiver.wait()
        if sync.base is not None:
            chunk = [(name, tensor.to(self.model_runner.device)) for name, tensor in sync.base.decode(names, chunk)]
        check_chunk(chunk, names, sync)
        sync.touched = True
        with sync.clock.stage("digest"):
            into = sync.reload.whole_targets(chunk)
            sync.digests.add(chunk, into)
        with sync.clock.stage("load"):
            sync.reload.load(chunk, written=into)
        sync.received.update(names)
        sync.chunks += 1

    def _r3_finish(self, sync: ReceivedSync, receiver: Receiver) -> None:
        """All chunks have arrived: let vLLM finish its layers. Does not wait for copies on a GPU."""
        assert sync.reload is not None
        with sync.clock.stage("finish"):
            # What follows may wait for the device, and would without end where the other side has died.
            receiver.wait()
            missing = sync.reload.missing()
            if missing:
                raise RuntimeError(
                    f"{len(missing)} layers of the engine have not got all their weights: {'; '.join(missing[:16])}"
                    f"{remedy(missing, sync.manifest)}"
                )
            sync.reload.finish()
            sync.uninitialised = queue_finite_check(sync.reload.layers)

    def _r3_of(self, state: WorkerState, sync_id: str, expected: SyncState) -> ReceivedSync:
        if state.sync is None or state.sync.id != sync_id or state.state is not expected:
            raise _RefusedError(
                f"sync {sync_id} is not {expected} here: the worker is {state.state}"
                + (f" ({state.cause})" if state.cause else "")
            )
        state.sync.renew()
        return state.sync

    def _r3_wait_for_the_call_before(self, sync: ReceivedSync) -> None:
        """Wait for the previous call's copies on a GPU: bounds how many chunks hold memory, as `r3_load` promises."""
        if sync.loaded is not None:
            with sync.clock.stage("wait"):
                wait_until(sync.loaded.query, lambda: False, sync.lease_s, "the copies of the call before")
                sync.loaded = None

    def _r3_give_up(self, state: WorkerState, cause: str) -> None:
        sync, state.sync = state.sync, None
        _drop_receiver(state)
        if sync is not None:
            if sync.touched:
                state.untouched = sync.kept & state.untouched if state.cause else sync.kept
                state.cause = cause
            if sync.reload is not None and sync.state is not SyncState.COMMITTED:
                sync.reload.abandon()

    def _r3_check_quantization(self, manifest: dict[str, list]) -> None:
        quantization = self.vllm_config.model_config.quantization
        if quantization is None:
            return
        if quantization != "fp8":
            raise _RefusedError(
                f"the engine is quantised ({quantization}); only fp8 with block scales can be synced into"
            )
        if not any(name.endswith(".weight_scale_inv") for name in manifest):
            raise _RefusedError(
                "the engine holds FP8 weights with block scales, and no *.weight_scale_inv is sent: vLLM would leave "
                "its scales uninitialised. Send what r3.weight_sync.quantised makes of the weights"
            )

    def _r3_reply(self, action: Callable[[WorkerState], Reply]) -> Reply:
        state: WorkerState = self.__dict__.setdefault("r3_state", WorkerState())
        reply: Reply = {}
        try:
            reply = action(state)
        except _RefusedError as error:
            reply = {"error": str(error)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
            self._r3_give_up(state, reply["error"])
        parallel = self.vllm_config.parallel_config
        return {
            "rank": self.rank,
            "dp_rank": parallel.data_parallel_rank,
            "world_size": parallel.world_size,
            "dp_size": parallel.data_parallel_size,
            "worker": state.worker,
            "gpu": gpu_uuid(self.model_runner.device),
            "version": state.version,
            "state": state.state.value,
            "cause": state.cause,
            "connection_id": None if state.receiver is None else state.receiver.connection_id,
            "base_version": None if state.base is None else state.base.version,
            **reply,
        }


def _drop_receiver(state: WorkerState) -> None:
    if state.receiver is not None:
        state.receiver.abort()
        state.receiver = None


def _zero(caches: Any) -> None:
    """Clear KV caches: values that a half-loaded model wrote, perhaps NaN, survive a reset of the prefix cache."""
    for cache in caches_in(caches):
        cache.zero_()
