"""The trainer's side of a sync: `WeightSync(engine).push(named_tensors, version=...)`."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.digest import combine, digest
from r3.weight_sync.transport import TRANSPORTS, Chunk, Transport


@dataclass(frozen=True, kw_only=True)
class SyncReceipt:
    """What every worker acknowledged.

    Attributes:
        version: committed, the same on every worker.
        digest: of names and content of all tensors, equal on both sides.
        workers: how many acknowledged.
        tensors, chunks, bytes: what was sent.
        seconds: from begin to the last acknowledgement, caches reset.
    """

    version: int
    digest: int
    workers: int
    tensors: int
    chunks: int
    bytes: int
    seconds: float


class WeightSync:
    """Complete weight syncs into a running engine, each of which commits on every worker or raises.

    Args:
        engine: a `vllm.LLM` started with `worker_extension_cls=r3.weight_sync.WORKER_EXTENSION`.
        transport: a `Transport`, or the name of one.
        dtype: floating-point tensors are sent in this dtype (the engine's), None to send them as they are.
        chunk_bytes: largest chunk; one tensor that is larger is a chunk of its own.
        timeout_s: longest wait for any answer of the engine.

    Raises:
        SyncError: the engine has no such extension, or a worker is not ready.

    Example:
        >>> sync = WeightSync(llm, dtype=torch.bfloat16)                                    # doctest: +SKIP
        >>> receipt = sync.push(model.state_dict().items(), version=1)                      # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Any,
        *,
        transport: str | Transport = "files",
        dtype: torch.dtype | None = None,
        chunk_bytes: int = 256 << 20,
        timeout_s: float = 600.0,
    ) -> None:
        if isinstance(transport, str):
            if transport not in TRANSPORTS:
                raise SyncError(f"transport: expected one of {sorted(TRANSPORTS)}, got {transport!r}")
            transport = TRANSPORTS[transport]()
        if chunk_bytes <= 0 or timeout_s <= 0:
            raise SyncError(f"expected chunk_bytes and timeout_s above 0, got {chunk_bytes} and {timeout_s}")
        self._engine = engine
        self._transport = transport
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self.poisoned: str | None = None
        """Why the engine's weights cannot be trusted until the next complete sync commits; None if they can."""
        self.version: int | None = self._call("r3_status")[0]["version"]
        """The version that every worker committed last; None before the first sync."""

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReceipt:
        """Send all weights and commit them as `version`.

        Args:
            named_tensors: the whole checkpoint, by Hugging Face names. A sharded tensor (DTensor) is gathered when its
                chunk is sent, so that every rank of its mesh must iterate; the others may discard.
            version: above every version committed before.

        Raises:
            SyncError: the sync did not commit everywhere; says which worker and why. The engine is then poisoned
                (`self.poisoned`) unless it refused the sync before touching a weight.
        """
        tensors = list(named_tensors)
        chunks = self._chunks(tensors)
        try:
            return self._push(tensors, chunks, version)
        except Exception:
            # Whatever went wrong here, the other ranks of sharded tensors gather all of them: they must not be left
            # waiting for this one.
            for _ in chunks:
                pass
            raise

    def _push(self, tensors: list[tuple[str, Tensor]], chunks: Iterator[Chunk], version: int) -> SyncReceipt:
        start = time.perf_counter()
        manifest = self._manifest(tensors)
        self._require_idle()
        self._call("r3_begin", version, self._transport.name, manifest)
        sent: dict[str, int] = {}
        index, size = -1, 0
        try:
            for index, chunk in enumerate(chunks):
                digests = {name: digest(tensor) for name, tensor in chunk}
                with self._transport.sending(index, chunk) as where:
                    self._call("r3_load", version, where, digests)
                sent |= digests
                size += sum(tensor.nbytes for _, tensor in chunk)
            total = combine(sent)
            answers = self._call("r3_commit", version)
            wrong = [f"rank {a['rank']}: {a}" for a in answers if (a["version"], a["digest"]) != (version, total)]
            if wrong:
                raise SyncError(f"expected version {version} with digest {total} on every worker, got:{summary(wrong)}")
            if not self._engine.reset_prefix_cache():
                raise SyncError("the engine did not reset its prefix cache, which holds keys of the old weights")
            label = getattr(self._engine, "update_weight_version", None)  # vLLM 0.27 and later
            if label is not None:
                label(str(version))
        except BaseException as error:
            self._abort(version, error)
            raise
        self.poisoned = None
        self.version = version
        return SyncReceipt(
            version=version,
            digest=total,
            workers=len(answers),
            tensors=len(sent),
            chunks=index + 1,
            bytes=size,
            seconds=time.perf_counter() - start,
        )

    def require_committed(self) -> None:
        """Raise `SyncError` if the engine's weights cannot be trusted: call before every rollout."""
        if self.poisoned is not None:
            raise SyncError(
                f"the engine holds half-loaded weights since a sync failed ({self.poisoned}); only a complete sync "
                "that commits makes it usable again"
            )

    def close(self) -> None:
        """Give back what the transport holds."""
        self._transport.close()

    def _abort(self, version: int, error: BaseException) -> None:
        self.poisoned = f"{type(error).__name__}: {error}"
        try:
            self._call("r3_abort", version, self.poisoned)
        except Exception as second:  # the first error is the one to report
            error.add_note(f"abort was not acknowledged: {second}") if hasattr(error, "add_note") else None

    def _require_idle(self) -> None:
        engine = getattr(self._engine, "llm_engine", None)
        if engine is not None and engine.has_unfinished_requests():
            raise SyncError("the engine has unfinished requests; finish or abort them before a sync")

    def _call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call `method` on every worker; raises if any did not answer, or answered with an error."""
        rpc: Callable | None = getattr(self._engine, "collective_rpc", None)
        if rpc is None:
            raise SyncError(f"engine: expected a vllm.LLM, got {type(self._engine).__name__}")
        try:
            answers = rpc(method, timeout=self._timeout_s, args=args)
        except Exception as error:
            raise SyncError(
                f"{method} was not answered within {self._timeout_s:g} s or not understood ({type(error).__name__}: "
                f"{error}). The engine must run with worker_extension_cls='r3.weight_sync.worker.WeightSyncWorker'"
            ) from error
        failed = [f"worker rank {answer['rank']}: {answer['error']}" for answer in answers if "error" in answer]
        if failed:
            raise SyncError(f"{method} failed on {len(failed)} of {len(answers)} workers:{summary(failed)}")
        return answers

    def _sent_dtype(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype

    def _manifest(self, tensors: list[tuple[str, Tensor]]) -> dict[str, list]:
        """Name -> [shape, dtype] of what will be sent."""
        if not tensors:
            raise SyncError("named_tensors: expected the whole checkpoint, got nothing")
        manifest = {name: [list(tensor.shape), str(self._sent_dtype(tensor))] for name, tensor in tensors}
        if len(manifest) != len(tensors):
            names = [name for name, _ in tensors]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SyncError(f"named_tensors: {len(twice)} names occur twice:{summary(twice)}")
        return manifest

    def _chunks(self, tensors: list[tuple[str, Tensor]]) -> Iterator[Chunk]:
        """Whole tensors, gathered and cast, in chunks of at most `chunk_bytes`."""
        chunk: Chunk = []
        size = 0
        for name, tensor in tensors:
            dtype = self._sent_dtype(tensor)
            nbytes = tensor.numel() * dtype.itemsize
            if chunk and size + nbytes > self._chunk_bytes:
                yield chunk
                chunk, size = [], 0
            chunk.append((name, gathered(tensor).to(dtype)))
            size += nbytes
        if chunk:
            yield chunk


def gathered(tensor: Tensor) -> Tensor:
    """The whole of `tensor`. One that is sharded (DTensor) is gathered: every rank of its mesh must come here."""
    whole = tensor.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole  # pyrefly: ignore
