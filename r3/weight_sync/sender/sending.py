"""The chunks of a sync, on their way to all workers."""

from collections.abc import Iterator

from r3.errors import SyncError
from r3.weight_sync.delta import DeltaBase
from r3.weight_sync.sender.calls import ParallelCalls, first_failure_of
from r3.weight_sync.sender.chunking import Round
from r3.weight_sync.sender.engine_group import EngineGroup
from r3.weight_sync.sender.progress import StagedChunk, SyncProgress
from r3.weight_sync.transports import Chunk, Transport


class ChunkSender:
    """Sends the chunks of one sync, each once, whatever the number of engines.

    Args:
        sync_id: of the sync.
        group: the engines.
        transport: moves the bytes.
        base: of a delta; None to send tensors whole.
        progress: is told what was sent.
    """

    def __init__(
        self, sync_id: str, group: EngineGroup, transport: Transport, base: DeltaBase | None, progress: SyncProgress
    ) -> None:
        self._sync_id = sync_id
        self._group = group
        self._transport = transport
        self._base = base
        self._progress = progress

    def send(self, beginning: list[ParallelCalls], rounds: Iterator[Round]) -> None:
        """Send all rounds. While workers begin or load, the next chunks are staged; one call hands over all of them."""
        staged: list[StagedChunk] = []
        loading: ParallelCalls | None = None
        try:
            more = self._stage(rounds, staged)
            while more and not self._is_full(staged) and not all(call.done() for call in beginning):
                more = self._stage(rounds, staged)
        finally:
            with self._progress.clock.stage("begin"):
                first_failure_of(*beginning)
        while more:
            if self._is_full(staged) or loading is None or loading.done():
                self._wait_for(loading)
                staged, loading = [], self._hand_over(staged)
            more = self._stage(rounds, staged)
        if staged:
            self._wait_for(loading)
            loading = self._hand_over(staged)
        with self._progress.clock.stage("digest"):
            # The last chunks are still in flight.
            self._progress.named = self._progress.digests.result()
        self._wait_for(loading)

    def takes_memory(self, chunk: Chunk) -> bool:
        """Whether sending `chunk` takes memory besides what the trainer keeps anyway."""
        return self._base is not None or self._transport.takes_memory(chunk)

    def _stage(self, rounds: Iterator[Round], staged: list[StagedChunk]) -> bool:
        """Gather and publish the next chunk, if there is one."""
        with self._progress.clock.stage("gather"):
            current = next(rounds, None)
            if current is None:
                return False
            chunk = current.chunk
            self._progress.require_readable(chunk)
            wire = chunk if self._base is None else self._base.encode(chunk)
            self._progress.sent_bytes += sum(tensor.nbytes for _, tensor in wire)
        with self._progress.clock.stage("publish"):
            where = self._transport.publish(self._progress.chunks + len(staged), wire)
            staged.append(StagedChunk(chunk, (current.names, where), self.takes_memory(chunk)))
        return True

    def _is_full(self, staged: list[StagedChunk]) -> bool:
        """Whether the staged chunks take as much memory as they may."""
        return sum(chunk.takes_memory for chunk in staged) >= self._transport.max_staged_chunks

    def _wait_for(self, loading: ParallelCalls | None) -> None:
        if loading is None:
            return
        with self._progress.clock.stage("wait"):
            loading.result()
            # The answers say that no chunk of a call before this one is needed any more.
            self._transport.release(self._progress.loading)

    def _hand_over(self, staged: list[StagedChunk]) -> ParallelCalls:
        with self._progress.clock.stage("transfer"):
            self._progress.loading = self._progress.chunks
            self._progress.chunks += len(staged)
            loading = self._group.start(
                "r3_load", self._sync_id, self._progress.loading, [chunk.announced for chunk in staged]
            )
            for index, chunk in enumerate(staged, self._progress.loading):
                self._transfer(index, chunk.announced[0], loading)
        with self._progress.clock.stage("digest"):
            # Only now, while the workers load.
            self._progress.add([item for chunk in staged for item in chunk.chunk])
        return loading

    def _transfer(self, index: int, names: list[str], loading: ParallelCalls) -> None:
        try:
            self._transport.transfer(index, loading.failed)
        except Exception as error:
            # A worker's own error is more informative.
            if loading.wait(1.0):
                loading.result()
            engines = ", ".join(engine.name for engine in self._group.engines)
            raise SyncError(
                f"chunk {index} ({names[0]} and {len(names) - 1} more) did not get to all workers of {engines}: {error}"
            ) from error
