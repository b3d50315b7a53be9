"""The worker extension of the tests of engines' adapters: it answers as it is asked to."""

from r3.weight_sync.worker import WeightSyncWorker


class EchoWorker(WeightSyncWorker):
    def r3_test_echo(self, *args) -> dict:
        return {"rank": self.rank, "echo": list(args)}

    def r3_test_error(self) -> dict:
        return {"rank": self.rank, "error": "as told"}

    def r3_test_raise(self) -> dict:
        raise RuntimeError("raised on purpose")
