"""Leases: blobs that a running process needs are not collected, and a process that died needs none.

A lease belongs to a process, named so that no other can be taken for it: its number, when it started, which boot.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from crdtmerge.store.database import Database


class Lease:
    """Held while in its context. ``hold`` adds blobs to it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.id = secrets.token_bytes(16)

    def __enter__(self) -> Self:
        pid = os.getpid()
        with self._database.transaction():
            self._database.run("INSERT INTO leases VALUES (?, ?, ?, ?)", (self.id, pid, _started(pid), _boot()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._database.transaction():
            end(self._database, self.id)

    def hold(self, digests: Iterable[bytes]) -> None:
        """Keep blobs from being collected until the lease ends."""
        with self._database.transaction():
            rows = [(self.id, digest) for digest in digests]
            self._database.run_all("INSERT OR IGNORE INTO leased VALUES (?, ?)", rows)

    def release(self, digests: Iterable[bytes]) -> None:
        """Blobs that are needed no longer, or by what refers to them."""
        with self._database.transaction():
            rows = [(self.id, digest) for digest in digests]
            self._database.run_all("DELETE FROM leased WHERE lease = ? AND digest = ?", rows)


def end(database: Database, lease: bytes) -> None:
    """Forget a lease."""
    database.run("DELETE FROM leased WHERE lease = ?", (lease,))
    database.run("DELETE FROM leases WHERE id = ?", (lease,))


def end_those_of_the_dead(database: Database) -> set[bytes]:
    """Forget the leases of processes that are gone; the ids of those that stand."""
    living = set()
    for lease, pid, started, boot in database.rows("SELECT id, pid, started, boot FROM leases"):
        if boot == _boot() and started == _started(pid) and started != -1:
            living.add(lease)
        else:
            end(database, lease)
    return living


def _boot() -> str:
    """Which boot of which machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process started, in the system's own clock ticks; 0 where the system does not say, -1 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return -1 if Path("/proc/self/stat").exists() else _alive(pid)
    except OSError:
        return -1


def _alive(pid: int) -> int:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        return 0
    return 0
