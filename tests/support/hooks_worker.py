"""The worker extension of the tests of hooks: one with which a test can take a hook out."""

from r3.vllm_compat.capture import routers


class UnhookingWorker:
    def r3_test_unhook(self, layer: int) -> list:
        dict(routers(self.model_runner.model))[layer].set_capture_fn(None)
        return []
