"""Group commit: what many threads write at once shares one sync of the disk, which is what a commit costs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from crdtmerge.store.database import Database

Result = TypeVar("Result")

TOGETHER_MAX = 1000
"""Pieces of work in one transaction: beyond, the sync is no longer what costs."""


class GroupCommit:
    """Runs pieces of work in transactions, each whole or not at all, as many together as are waiting.

    Whoever finds the lock free does the work of all who came meanwhile; a piece that fails is undone alone.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._leading = threading.Lock()

    def run(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, durable when it returns. Raises what it raises, or StorageError."""
        if self._database.in_transaction:
            return work()
        future: Future[Result] = Future()
        self._waiting.append((work, future))
        with self._leading:
            while not future.done():
                self._lead()
        return future.result()

    def _lead(self) -> None:
        together = [self._waiting.popleft() for _ in range(min(len(self._waiting), TOGETHER_MAX))]
        done: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with self._database.transaction():
                for work, future in together:
                    try:
                        with self._database.savepoint():
                            result = work()
                    except BaseException as fault:
                        if not self._database.in_transaction:
                            raise  # SQLite gave up the whole of it: what went before did not happen either
                        done.append((future, None, fault))
                    else:
                        done.append((future, result, None))
        except BaseException as fault:  # noqa: BLE001 - the commit failed for all of them
            done = [(future, None, fault) for _, future in together]
        for future, result, failure in done:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
