"""A row that does not hold what its columns declare is our error that names the file, is found, and is mended."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from crdtmerge.errors import CrdtMergeError, DatabaseError
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.tables import NAMES, RAW, SHAPES, MemoryTables, fits
from crdtmerge.store import schema
from crdtmerge.store.database import Database, SqliteTables
from tests.pool.replicas import contents, founded, sql

SMALL = {"w": np.float32([0, 0])}
FILL = {"BLOB": bytes(32), "TEXT": "F32", "INTEGER": 8, "REAL": 1.5}
WRONG = {
    "BLOB": (None, 7, "text"),
    "TEXT": (None, b"\xff"),
    "INTEGER": (None, "text", b"\xff"),
    "REAL": (None, b"x"),
}
READS: list[Callable[[Replica], object]] = [
    lambda replica: (replica.visible, replica.opset.hidden(), replica.root, replica.state_root, replica.heads),
    lambda replica: (replica.last_ops(3), replica.known_keys(), replica.peers.every(), replica.ready()),
    lambda replica: (replica.giving().needed(), replica.giving().manifest_sizes()),
    lambda replica: [replica.bytes_of(content) for content in replica.opset.contents()],
    lambda replica: replica.peers.redeem(bytes(32), bytes(32)),
    lambda replica: replica.add({"w": np.float32([9, 9])}),
    lambda replica: replica.resolve(),
    lambda replica: replica.gc(0),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """A small pool with rows in the tables, and its database."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as own:
        own.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        own.setenv("CRDTMERGE_CACHE", str(tmp_path / "cache"))
        with founded(tmp_path / "pool", like=SMALL) as replica:
            for n in range(3):
                replica.add({"w": np.float32([n, 1])}, weight=n)
            replica.remove(contents(replica).pop())
            replica.retract(contents(replica).pop())
        folder = tmp_path / "pool"
        for table, columns in schema._COLUMNS.items():
            if not sql(folder, f"SELECT 1 FROM {table}") and not table.startswith("set_"):
                row = tuple(FILL[declared] for _, declared, _ in columns)
                sql(folder, f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        sql(folder, "UPDATE waiting SET (op, wire) = (SELECT key, value FROM set_ops)")
        yield folder, (folder / "pool.sqlite").read_bytes()


def _damage(folder: Path, whole: bytes, table: str, column: str, value: Any) -> None:
    """The sound database with another value in one row, whatever the schema forbids."""
    for beside in folder.glob("pool.sqlite-*"):
        beside.unlink()
    (folder / "pool.sqlite").write_bytes(whole)
    connection = sqlite3.connect(folder / "pool.sqlite", isolation_level=None)
    said = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE name = ?", (table,))
    connection.close()
    connection = sqlite3.connect(folder / "pool.sqlite", isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    first = f"{column} IS (SELECT {column} FROM {table} LIMIT 1)"
    with suppress(sqlite3.IntegrityError):  # a key of a table without row ids is never NULL
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {first}", (value,))
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (*said, table))
    connection.close()


def _says_what_to_do(said: str) -> bool:
    """Of a row that cannot be read the file is named; of an operation that nothing leads to any more, its id."""
    named = "pool.sqlite: is damaged" in said and "fsck --mend" in said
    return named or "is not here" in said or "name it again by `crdtmerge keys import`" in said


def _wrong(declared: str, nullable: bool) -> tuple[Any, ...]:
    return tuple(value for value in WRONG[declared] if value is not None or not nullable)


EMPTY = tuple(f"set_{name}" for name in ("forks", "void", "members", "recipes", "context", "contexts"))


@pytest.mark.parametrize("table", [table for table in schema.TABLES if table not in EMPTY])
def test_a_row_of_the_wrong_shape_is_our_error_and_is_mended(pool: tuple[Path, bytes], table: str) -> None:
    folder, whole = pool
    for name, declared, fixed in schema._COLUMNS[table]:
        if name == "value":
            continue
        for value in _wrong(declared, nullable=not fixed):
            _damage(folder, whole, table, name, value)
            with Replica.open(folder) as replica:
                misfits = replica._room.database.misfits()
                assert misfits.keys() == {table} or (not misfits and value is None), (name, value)
                if not misfits:
                    continue
                assert any(f" {table} " in fault for fault in replica.fsck().faults), (name, value)
                said = []
                for read in READS:
                    try:
                        read(replica)
                    except DatabaseError as damage:
                        said.append(str(damage))
                    except CrdtMergeError:
                        pass
                assert all(_says_what_to_do(one) for one in said), (name, value, said)
                replica.fsck(mending=True)
                assert not replica._room.database.misfits(), (name, value)


def _values(shape: Any) -> Iterator[Any]:
    """Values that are of other shapes, close to one that is."""
    yield from (5, "text", {"a": 1}, (), (None,), (1, 2, 3))
    if shape is not None:
        yield None
    if shape is not bytes:
        yield b"\xc1"
    if isinstance(shape, tuple):
        for at in range(len(shape)):
            yield tuple(3.5 if number == at else b"" for number in range(len(shape)))


@pytest.mark.parametrize("table", NAMES)
def test_a_value_of_the_wrong_shape_is_our_error_that_names_the_file(
    pool: tuple[Path, bytes], tmp_path: Path, table: str
) -> None:
    database = Database.create(tmp_path)
    tables = SqliteTables(database)
    for number, value in enumerate(_values(SHAPES[table])):
        if fits(SHAPES[table], value):
            continue
        key = number.to_bytes(32, "big")
        kept = value if table in RAW else None if value is None else msgpack.packb(value)
        if isinstance(kept, dict | tuple):
            continue
        database.run(f"INSERT INTO set_{table} VALUES (?, ?, ?)", (key, b"", kept))
        reads: list[Callable[[bytes], object]] = [
            lambda key: tables.get(table, key),
            lambda key: tables.members(table, key),
            lambda key: list(tables.every(table, key)),
        ]
        for read in reads:
            with pytest.raises(DatabaseError, match=rf"pool.sqlite: is damaged \(a row of the table {table} "):
                read(key)
    database.close()


def test_what_a_set_keeps_is_of_the_shapes(pool: tuple[Path, bytes]) -> None:
    folder, whole = pool
    (folder / "pool.sqlite").write_bytes(whole)
    with Replica.open(folder) as replica:
        tables = MemoryTables()
        again = type(replica.opset)(replica.genesis, tables)
        ops = list(replica.opset.ops())
        manifests = {content: replica.manifest(content) for content in replica.opset.contents()}
        again.join(ops, {content: found for content, found in manifests.items() if found})
    kept = [[(name, value) for _, _, value in tables.every(name)] for name in NAMES]
    assert all(fits(SHAPES[name], value) for name, value in itertools.chain(*kept))
    assert sum(map(len, kept)) > 20


@pytest.mark.parametrize("name", sorted(schema._META))
def test_a_value_of_the_replicas_own_that_is_of_another_type_is_our_error(tmp_path: Path, name: str) -> None:
    database = Database.create(tmp_path)
    database.keep(name, 2.5)
    with pytest.raises(DatabaseError, match=f"is damaged .its {name} is something else"):
        database.meta(name)
    database.close()


@pytest.mark.parametrize(
    ("column", "value"), [("inline", b"short"), ("bytes", 3), ("pieces", b""), ("dtype", "F99"), ("shape", b"\xc1")]
)
def test_a_blob_whose_row_contradicts_itself_is_named_and_mended(
    pool: tuple[Path, bytes], column: str, value: object
) -> None:
    folder, whole = pool
    _damage(folder, whole, "blobs", column, value)
    with Replica.open(folder) as replica:
        report = replica.fsck()
        assert [fault for fault in report.faults if "is not described as it was" in fault]
        assert report.damaged
        with pytest.raises(DatabaseError, match=r"pool.sqlite: is damaged \(the row of a blob"):
            replica._room.blobs.get(report.damaged[0])
        replica.fsck(mending=True)
        assert not replica.fsck().damaged


def test_a_schema_that_lost_a_table_is_a_damaged_database(pool: tuple[Path, bytes]) -> None:
    folder, whole = pool
    (folder / "pool.sqlite").write_bytes(whole)
    sql(folder, "DROP TABLE ready")
    with Replica.open(folder) as replica, pytest.raises(DatabaseError, match="no such table: ready"):
        replica.ready()
