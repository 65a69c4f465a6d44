"""The tables of a replica's database: how they are made, and what a sound row of each holds.

SQLite answers what the bytes of a page say: where one was damaged, NULL or a number may stand where bytes are declared.
So each row that is read is held against the declared types of its columns (a name means the same in every table), and
each value of an op set's table against the shape that ``replica.tables`` names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from crdtmerge.replica.tables import NAMES

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE manifests (content BLOB PRIMARY KEY, manifest BLOB NOT NULL);
CREATE TABLE seen (op BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE waiting (op BLOB PRIMARY KEY, wire BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs (
    digest BLOB PRIMARY KEY, bytes INTEGER NOT NULL, pieces BLOB NOT NULL, dtype TEXT, shape BLOB, nonfinite BLOB,
    inline BLOB, state TEXT NOT NULL, touched REAL NOT NULL);
CREATE TABLE partials (
    digest BLOB PRIMARY KEY, bytes INTEGER NOT NULL, dtype TEXT NOT NULL, shape BLOB NOT NULL, pieces BLOB NOT NULL,
    have BLOB NOT NULL, nonfinite BLOB, touched REAL NOT NULL);
CREATE TABLE peers (key BLOB PRIMARY KEY, url TEXT) WITHOUT ROWID;
CREATE TABLE invites (secret BLOB PRIMARY KEY, expires REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE ready (content BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE leases (id BLOB PRIMARY KEY, pid INTEGER NOT NULL, started INTEGER NOT NULL, boot TEXT NOT NULL);
CREATE TABLE leased (lease BLOB NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (lease, digest)) WITHOUT ROWID;
CREATE INDEX leased_by_digest ON leased (digest);
CREATE TABLE merges (merge BLOB PRIMARY KEY, receipt BLOB NOT NULL);
CREATE TABLE plans (merge BLOB PRIMARY KEY, plan BLOB NOT NULL);
"""
_SET = "(key BLOB NOT NULL, member BLOB NOT NULL, value BLOB, PRIMARY KEY (key, member)) WITHOUT ROWID"

STATEMENTS = (*_TABLES.strip().split(";\n"), *(f"CREATE TABLE set_{name} {_SET}" for name in NAMES))
"""What makes an empty database."""

_META = {"genesis": bytes, "author": bytes, "incarnation": bytes, "quota": int, "place": str, "name": str}
_OF: dict[str, tuple[type, ...]] = {"BLOB": (bytes,), "TEXT": (str,), "INTEGER": (int,), "REAL": (float, int)}
_STORED = {"BLOB": "'blob'", "TEXT": "'text'", "INTEGER": "'integer'", "REAL": "'real', 'integer'"}

_COLUMNS = {
    match["table"]: re.findall(r"(\w+) (BLOB|TEXT|INTEGER|REAL)( NOT NULL| PRIMARY KEY|)", match["columns"])
    for statement in STATEMENTS
    if (match := re.match(r"CREATE TABLE (?P<table>\w+) (?P<columns>.*)", statement, re.DOTALL))
}
"""Table -> its columns: name, type, and what keeps it from being NULL, if anything."""


def _kinds() -> dict[str, frozenset[type]]:
    found: dict[str, set[type]] = {}
    for columns in _COLUMNS.values():
        for name, declared, whole in columns:
            found.setdefault(name, set()).update(_OF[declared], () if whole else (type(None),))
    return {name: frozenset(kinds) for name, kinds in found.items() if name != "value"}


_KINDS = _kinds()


@lru_cache(maxsize=256)
def _expected(names: tuple[str, ...]) -> tuple[tuple[int, str, frozenset[type]], ...]:
    return tuple((at, name, _KINDS[name]) for at, name in enumerate(names) if name in _KINDS)


def misfit(names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str | None:
    """The first column whose value in some row has not the type that the schema declares; None if all have.

    >>> misfit(("content", "manifest"), [(b"id", b"bytes"), (b"id", None)])
    'manifest'
    """
    for at, name, kinds in _expected(names):
        if not kinds.issuperset({type(row[at]) for row in rows}):
            return name
    return None


def meta_fits(name: str, value: Any) -> bool:
    """Whether a value of the replica's own is of its type, or was never kept."""
    return value is None or name not in _META or type(value) is _META[name]


def sound(table: str) -> str:
    """The condition of a statement that holds for the rows of a table whose columns have their types.

    >>> sound("ready")
    "typeof(content) IN ('blob')"
    """
    null = {"": ", 'null'"}
    return " AND ".join(
        f"typeof({name}) IN ({_STORED[declared]}{null.get(whole, '')})"
        for name, declared, whole in _COLUMNS[table]
        if (table, name) != ("meta", "value")
    )


TABLES = tuple(_COLUMNS)
"""Every table's name."""
