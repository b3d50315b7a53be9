"""The worker extension of the engine tests: the real one, with closings that a test can take out."""

import contextlib

from r3.weight_sync.worker import WeightSyncWorker, reload
from r3.weight_sync.worker.batch_guard import BatchGuard

CLOSINGS = {
    "expert_prepack": [(reload, "expert_prepack", contextlib.nullcontext)],
    "batch guard": [(BatchGuard, "__call__", lambda self, *args, **kwargs: self._execute(*args, **kwargs))],
    "rehearsal": [(reload.LayerwiseReload, "misfits", lambda self, manifest: [])],
    "abandon": [
        (reload.LayerwiseReload, "abandon", lambda self: None),
        (reload.LayerwiseReload, "misfits", lambda self, manifest: []),
    ],
}


class BreakableWorker(WeightSyncWorker):
    def r3_test_remove(self, closing: str) -> list:
        removed = self.__dict__["r3_removed"] = []
        for where, name, nothing in CLOSINGS[closing]:
            removed.append((where, name, getattr(where, name)))
            setattr(where, name, nothing)
        return []

    def r3_test_restore(self) -> list:
        for where, name, closing in self.__dict__.pop("r3_removed"):
            setattr(where, name, closing)
        return []

    def r3_test_fail(self, method: str) -> list:
        """Let `method` answer an error, as a worker does that runs out of memory."""

        def fail(state):
            raise MemoryError("no memory left")

        setattr(self, method, lambda *args: self._r3_reply(fail))
        return []

    def r3_test_mend(self, method: str) -> list:
        delattr(self, method)
        return []

    def r3_test_length(self, text: str) -> dict:
        return self._r3_reply(lambda state: {"length": len(text)})

    def r3_test_load_balancing(self, *, moves: bool) -> list:
        self.vllm_config.parallel_config.enable_eplb = moves
        return []
