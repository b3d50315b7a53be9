"""The receiver of a weight sync. Runs in vLLM's workers."""

from r3.weight_sync.worker.extension import WeightSyncWorker

__all__ = ["WeightSyncWorker"]
