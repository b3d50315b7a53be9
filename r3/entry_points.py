"""What vLLM loads of r3 by its dotted name, in processes of its own."""

WORKER_EXTENSION = "r3.weight_sync.worker.WeightSyncWorker"
"""For `LLM(worker_extension_cls=...)`: the part of a weight sync that runs in vLLM's workers."""

WORKER = "r3.capture.in_engine.routing_worker.CapturingWorker"
"""For `LLM(worker_cls=...)`: the capture by hooks."""

SCHEDULER = "r3.capture.in_engine.routing_scheduler.capture_scheduler"
"""For `LLM(scheduler_cls=...)`: the capture by hooks."""
