"""The worker extension of the fault tests: the real one, which can be stopped, killed or handed wrong bytes."""

import os
import signal
from typing import Any

from r3.weight_sync.worker import WeightSyncWorker


class FaultyWorker(WeightSyncWorker):
    def r3_test_arm(self, faults: list[dict[str, Any]]) -> dict[str, Any]:
        """Faults of `faults.Fault` by its fields, each for one `rank`, or for all where it is None."""
        self.__dict__["r3_test_faults"] = [f for f in faults if f["rank"] in (None, self.rank)]
        return {"rank": self.rank, "pid": os.getpid()}

    def r3_test_done(self) -> dict[str, Any]:
        """What has happened since, and what is forgotten now."""
        self.__dict__["r3_test_faults"] = []
        touched = self.__dict__.get("r3_test_touched", False)
        return {"rank": self.rank, "done": self.__dict__.pop("r3_test_events", []), "touched": touched}

    def r3_reserve(self, *args: Any) -> Any:
        return self.r3_test_around("reserve", super().r3_reserve, *args)

    def r3_begin(self, *args: Any) -> Any:
        return self.r3_test_around("begin", super().r3_begin, *args)

    def _r3_load_one(self, sync: Any, *args: Any) -> Any:
        return self.r3_test_around(f"load:{sync.chunks}", super()._r3_load_one, sync, *args)

    def r3_seal(self, *args: Any) -> Any:
        return self.r3_test_around("seal", super().r3_seal, *args)

    def r3_commit(self, *args: Any) -> Any:
        return self.r3_test_around("commit", super().r3_commit, *args)

    def r3_release(self, *args: Any) -> Any:
        return self.r3_test_around("release", super().r3_release, *args)

    def r3_abort(self, *args: Any) -> Any:
        return self.r3_test_around("abort", super().r3_abort, *args)

    def r3_test_around(self, point: str, call: Any, *args: Any) -> Any:
        armed = self.__dict__.get("r3_test_faults", [])
        here = [f for f in armed if f["point"] == point]
        # Each strikes once: what comes after is the healing.
        self.__dict__["r3_test_faults"] = [f for f in armed if f not in here]
        for fault in here:
            if fault["when"] == "before":
                self.r3_test_strike(fault)
        answer = call(*args)
        if point.startswith("load"):
            self.__dict__["r3_test_touched"] = True
        elif point == "commit" and "error" not in answer:
            self.__dict__["r3_test_touched"] = False
        for fault in here:
            if fault["when"] == "after":
                self.r3_test_strike(fault)
        return answer

    def r3_test_strike(self, fault: dict[str, Any]) -> None:
        happened = {"kind": fault["kind"], "point": fault["point"], "rank": self.rank}
        self.__dict__.setdefault("r3_test_events", []).append(happened)
        match fault["kind"]:
            case "worker stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "worker killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "worker raises":
                self.r3_test_receive(lambda chunk: (_ for _ in ()).throw(MemoryError("injected: no memory left")))
            case "worker memory":
                from schedules import tampered

                def change(chunk: Any) -> Any:
                    changed, happened["tensor"] = tampered(chunk, fault["how"], fault["pick"])
                    return changed

                self.r3_test_receive(change)

    def r3_test_receive(self, change: Any) -> None:
        """The next chunk is what `change` makes of the one that comes."""
        receiver = self.__dict__["r3_state"].receiver
        if receiver is None:
            return
        receive = receiver.receive

        def once(where: Any) -> Any:
            del receiver.receive
            return change(receive(where))

        receiver.receive = once
