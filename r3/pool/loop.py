"""An event loop in a thread of its own, which synchronous callers send work to."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent import futures
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """The loop runs until `close`. The thread is a daemon: it does not hold the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="r3-pool", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> futures.Future[T]:
        """Run `coroutine` on the loop. The future can be waited for in any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns on the loop's thread."""

        async def run() -> T:
            return function()

        return self.start(run()).result()

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Run `last`, cancel what runs on the loop, and end it."""

        async def end() -> None:
            with contextlib.suppress(Exception):
                await last()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.start(end()).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()
