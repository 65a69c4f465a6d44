"""An event loop in virtual time: when nothing is ready it goes on to the next timer at once. No threads, no sockets.

What runs on it depends on its input alone: the wall clock is never read, and tasks take turns in the order in which
they became ready.

>>> async def sleep_long() -> float:
...     await asyncio.sleep(86400)
...     return asyncio.get_running_loop().time()
>>> run(sleep_long())
86400.0
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop. ``faults`` are what tasks raised, other than that they were cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._now = 0.0
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self.faults: list[BaseException] = []
        self.set_exception_handler(lambda _, context: self._unhandled(context))

    def time(self) -> float:
        """Seconds since the loop began."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Go on to the next timer: what the base class calls to wait."""
        assert timeout is not None, "nothing is ready and no timer runs: this would wait for ever"
        self._now += max(timeout, 0.0)
        return []

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """A task whose fault is remembered."""
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    @property
    def running(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    def end(self) -> None:
        """Cancel every task, in the order in which they began, and close."""
        while left := [task for task in self._tasks if not task.done()]:
            for task in left:
                task.cancel()
            self.run_until_complete(_all_of(left))
        self.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.faults.append(fault)

    def _unhandled(self, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or RuntimeError(context["message"]))


async def _all_of(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time. Raises what it raises, or the first fault of a task."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.end()
