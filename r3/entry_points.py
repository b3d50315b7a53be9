"""What vLLM loads of r3 by its dotted name, in processes of its own."""

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"
"""For `LLM(worker_extension_cls=...)`: the part of a weight sync that runs in vLLM's workers."""

WORKER = "r3.capture.in_engine.routing_worker.CapturingWorker"
"""For `LLM(worker_cls=...)`: the capture by hooks."""

SCHEDULER = "r3.capture.in_engine.routing_scheduler.capture_scheduler"
"""For `LLM(scheduler_cls=...)`: the capture by hooks."""

INVARIANT_WORKER = "r3.vllm_compat.invariant_worker.InvariantWorker"
"""For `joined_extension`: what vLLM leaves out to be batch-invariant."""


def joined_extension(other: str) -> str:
    """The dotted name of a class that is r3's worker extension and `other`: vLLM takes only one.

    Args:
        other: dotted name of a class that vLLM's workers can import.

    Example:
        >>> joined_extension("trainer.workers.Extension")
        'r3.weight_sync.worker.joined.trainer:workers:Extension'
    """
    return f"r3.weight_sync.worker.joined.{other.replace('.', ':')}"
