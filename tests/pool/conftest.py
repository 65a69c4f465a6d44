"""Every test has a state folder and a digest cache of its own, and neither the user's settings nor the disk matter.

Syncs are left out in the tests' own process: none of them cuts the power, and a killed process loses nothing without.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3

import pytest

from crdtmerge.store.database import Database

_connection = Database._connection


def _unsynced(database: Database) -> sqlite3.Connection:
    """A connection of a database that does not wait for the disk."""
    is_new = getattr(database._local, "connection", None) is None
    connection = _connection(database)
    if is_new:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("PRAGMA synchronous = OFF")
    return connection


@pytest.fixture(autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("CRDTMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("CRDTMERGE_KERNELS", "CRDTMERGE_BLOCK", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(Database, "_connection", _unsynced)
