"""Timing of a sync by stage."""

import contextlib
import time
from collections.abc import Iterator


class StageTimer:
    """Host seconds by stage, and since the timer was created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.stages_s: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages_s[name] = self.stages_s.get(name, 0.0) + time.perf_counter() - start

    def total_s(self) -> float:
        return time.perf_counter() - self._start
