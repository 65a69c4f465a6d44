"""A pool of threads over independent blocks: results in order, a bounded number in flight, errors at once.

The functions that run here spend their time in calls that release the interpreter lock (reading, hashing,
kernels, torch operations), and none of their results depends on which thread runs what.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads() -> int:
    """As many threads as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Threads that share out blocks.

    >>> with Workers(2) as workers:
    ...     list(workers.map(lambda n: n * n, range(4)))
    [0, 1, 4, 9]
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = default_threads() if threads is None else threads
        assert self.threads >= 1, "at least one thread"
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="crdtmerge")

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``work`` of each item, in the order of the items; the first error ends it and is raised.

        One thread is the caller's own.
        """
        if self.threads == 1:
            yield from map(work, items)
            return
        flying: deque[Future[Result]] = deque()
        try:
            for item in items:
                flying.append(self._pool.submit(work, item))
                if len(flying) > 2 * self.threads:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
            for future in flying:
                if not future.cancelled():
                    future.exception()

    def each(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """``work`` of each item, for its effects."""
        for _ in self.map(work, items):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
