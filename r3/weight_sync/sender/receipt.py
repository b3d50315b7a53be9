"""The receipt of a committed sync."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SyncReceipt:
    """A committed sync, as acknowledged by every worker.

    Attributes:
        version: committed, the same on every worker.
        digest: of names and content of all tensors, equal on both sides.
        workers: number of workers of all engines that were not lost; each has acknowledged.
        tensors, chunks: what was sent.
        bytes: of the tensors.
        sent_bytes: handed to the transport: less than `bytes` if only changes were sent.
        complete: whether all tensors were sent whole.
        draft_model: of speculative decoding: "synced", or why it keeps the weights that it was loaded with; "" if there
            is none.
        frozen: what the caller left out: module paths of the checkpoint.
        kept: the engine's layers below `frozen`, on any worker: they keep their weights.
        seconds: from begin to the last acknowledgement, caches reset and engines resumed.
        stages_s: the trainer's time by stage: pause, begin, gather (making the tensors, delta included), publish,
            transfer, digest, wait (for workers that still load the chunk before), seal, commit, resume. GPU-resident
            weights are read for their digests in pause and begin.
        worker_stages_s: the slowest worker's, each stage by itself: receive, digest (and what is written with it), load
            (the rest), wait (for its device), finish (vLLM's processing), settle (for all that was queued, digests
            compared).
    """

    version: int
    digest: int
    workers: int
    tensors: int
    chunks: int
    bytes: int
    sent_bytes: int
    complete: bool
    draft_model: str
    frozen: tuple[str, ...]
    kept: tuple[str, ...]
    seconds: float
    stages_s: dict[str, float]
    worker_stages_s: dict[str, float]
