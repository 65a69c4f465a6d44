"""The database of a replica: SQLite in WAL mode with full syncs; one writer at a time, any number of readers.

RULES
1. What a transaction wrote is durable when it returns, or nothing of it happened.
2. Processes take turns by SQLite's own lock: a transaction sees all that was committed before it.
3. The folder must be on a local disk: WAL needs memory that processes share.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from crdtmerge.errors import DatabaseError, ReplicaError, StorageError
from crdtmerge.replica.tables import NAMES, RAW, SHAPES, fits
from crdtmerge.store import schema

APPLICATION_ID = 0x43524D47
"""``CRMG`` in the file's header, so that ``file`` and we know it."""

SCHEMA = 1
BUSY_SECONDS = 60.0
SETTINGS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "cache_size = -65536",
    "wal_autocheckpoint = 8000",
    "temp_store = MEMORY",
)
"""Every commit is synced; 64 MiB of pages are remembered, 32 MiB of log are gathered before they move to the file;
what undoes a savepoint is kept in memory: in a file it would cost a tenth of a join."""
NAME = "pool.sqlite"

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "9p", "fuse.sshfs", "glusterfs", "lustre"})


class Database:
    """An open database. Connections belong to threads; a transaction belongs to the thread that began it."""

    def __init__(self, path: Path) -> None:
        """Use ``create`` or ``open``."""
        self.path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._names: dict[str, tuple[str, ...]] = {}

    @classmethod
    def create(cls, folder: Path) -> Database:
        """Make the database of a new replica. Raises StorageError, ReplicaError."""
        database = cls(folder / NAME)
        refuse_network(folder)
        with database.failing():
            connection = database._connection()
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            with database.transaction():
                for statement in schema.STATEMENTS:
                    connection.execute(statement)
        return database

    @classmethod
    def open(cls, folder: Path) -> Database:
        """Open the database of a replica. Raises ReplicaError."""
        path = folder / NAME
        if not path.is_file():
            raise ReplicaError(
                f"{folder}: is not a replica (no {NAME} there). Make one with: crdtmerge init {folder} --base MODEL"
            )
        database = cls(path)
        refuse_network(folder)
        with database.failing():
            found = database.one("PRAGMA application_id"), database.one("PRAGMA user_version")
        if found != ((APPLICATION_ID,), (SCHEMA,)):
            raise ReplicaError(f"{path}: is not the database of a replica that this version reads.")
        return database

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything in it is committed together, durably, or not at all. Within another it is part of that."""
        connection = self._connection()
        if connection.in_transaction:
            assert not getattr(self._local, "reading", False), "nothing is written within a snapshot"
            yield connection
            return
        with self.failing():
            connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            with self.failing():
                connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is within a transaction."""
        return self._connection().in_transaction

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part of a transaction that can fail alone."""
        self.run("SAVEPOINT part")
        try:
            yield
            self.run("RELEASE part")
        except BaseException:
            if self.in_transaction:
                self.run("ROLLBACK TO part")
                self.run("RELEASE part")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Reads in it see one state, whatever others commit meanwhile."""
        connection = self._connection()
        if connection.in_transaction:
            yield
            return
        with self.failing():
            connection.execute("BEGIN")
        self._local.reading = True
        try:
            yield
        finally:
            self._local.reading = False
            if connection.in_transaction:
                with self.failing():
                    connection.execute("ROLLBACK")

    def run(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Carry out a statement."""
        try:
            self._connection().execute(statement, values)
        except _FAULTS as fault:
            raise self._failed(fault) from fault

    def run_all(self, statement: str, values: Sequence[Sequence[Any]]) -> None:
        """Carry out a statement for each of many rows of values."""
        try:
            self._connection().executemany(statement, values)
        except _FAULTS as fault:
            raise self._failed(fault) from fault

    def one(self, statement: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, if there is one. Raises DatabaseError for one whose values are not of their types."""
        try:
            cursor = self._connection().execute(statement, values)
            row: tuple[Any, ...] | None = cursor.fetchone()
        except _FAULTS as fault:
            raise self._failed(fault) from fault
        if row is not None:
            self._check(statement, cursor, [row])
        return row

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows. Raises DatabaseError where a value is not of its type."""
        try:
            cursor = self._connection().execute(statement, values)
            rows = cursor.fetchall()
        except _FAULTS as fault:
            raise self._failed(fault) from fault
        self._check(statement, cursor, rows)
        return rows

    def _check(self, statement: str, cursor: sqlite3.Cursor, rows: Sequence[tuple[Any, ...]]) -> None:
        names = self._names.get(statement)
        if names is None:
            names = self._names[statement] = tuple(column[0] for column in cursor.description or ())
        column = schema.misfit(names, rows)
        if column is not None:
            raise self.damaged(f"a row has something else in the column {column}")

    def sound(self, columns: str, table: str) -> list[tuple[Any, ...]]:
        """The rows of a table that hold what is declared, whatever became of the others."""
        return self.rows(f"SELECT {columns} FROM {table} WHERE {schema.sound(table)}")

    def misfits(self) -> dict[str, int]:
        """Tables with rows that do not hold what is declared, and how many."""
        counted = (
            f"SELECT '{table}', count(*) FROM {table} WHERE NOT ({schema.sound(table)})" for table in schema.TABLES
        )
        return {table: count for table, count in self.rows(" UNION ALL ".join(counted)) if count}

    def drop_misfits(self) -> None:
        """Remove those rows, within a transaction."""
        for table in self.misfits():
            self.run(f"DELETE FROM {table} WHERE NOT ({schema.sound(table)})")

    def meta(self, name: str) -> Any:
        """A value of the replica's own, None if it was never kept. Raises DatabaseError for one of another type."""
        row = self.one("SELECT value FROM meta WHERE name = ?", (name,))
        if row is not None and not schema.meta_fits(name, row[0]):
            raise self.damaged(f"its {name} is something else")
        return None if row is None else row[0]

    def keep(self, name: str, value: Any) -> None:
        """Keep a value of the replica's own."""
        self.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def version(self) -> int:
        """A number that changes when another connection commits."""
        row = self.one("PRAGMA data_version")
        assert row is not None, "the pragma always answers"
        return int(row[0])

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._local = threading.local()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except _FAULTS as fault:
            raise self._failed(fault) from fault

    def _failed(self, fault: Exception) -> ReplicaError | StorageError:
        said = str(fault)
        if isinstance(fault, UnicodeDecodeError) or any(sign in said for sign in _DAMAGE):
            return self.damaged(said)
        return StorageError(
            f"{self.path}: {fault}. Nothing that was acknowledged is lost; make room or mend the disk, then repeat "
            "what you did."
        )

    def damaged(self, what: str) -> DatabaseError:
        """The error for a database in which something is not as it was written."""
        return DatabaseError(
            f"{self.path}: is damaged ({what}). Run `crdtmerge fsck --mend`. What that does not mend is on the peers "
            "of this replica: begin a new one with `crdtmerge init --from`, and give it this one's key.pem with "
            "`crdtmerge keys import`."
        )

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            with self.failing():
                found = sqlite3.connect(
                    self.path,
                    timeout=BUSY_SECONDS,
                    isolation_level=None,
                    check_same_thread=False,
                    cached_statements=256,
                )
                for setting in SETTINGS:
                    found.execute(f"PRAGMA {setting}")
            self._local.connection = found
            with self._lock:
                self._connections.append(found)
        return found


_FAULTS = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What SQLite raises; the second from damaged texts."""

_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "Could not decode")
"""What its messages say of files and schemas that are not what was written."""


_AFTER = b"\xff" * 256
"""Longer than any key: what begins with a prefix is less than the prefix and this."""


class SqliteTables:
    """The tables of an op set in a database. Values are MessagePack, except where they are bytes already."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = {
            name: _Statements(
                f"SELECT value FROM set_{name} WHERE key = ? AND member = ?",
                f"INSERT OR REPLACE INTO set_{name} VALUES (?, ?, ?)",
                f"DELETE FROM set_{name} WHERE key = ? AND member = ?",
                f"SELECT member, value FROM set_{name} WHERE key = ? ORDER BY member",
                f"SELECT key, member, value FROM set_{name} WHERE key >= ? AND key < ? ORDER BY key, member",
                f"SELECT count(*) FROM set_{name}",
            )
            for name in NAMES
        }

    def get(self, table: str, key: bytes, member: bytes = b"") -> Any:
        """The value, None if there is none."""
        row = self._database.one(self._sql[table].get, (key, member))
        return None if row is None else self._read(table, row[0])

    def has(self, table: str, key: bytes, member: bytes = b"") -> bool:
        """Whether there is a value."""
        return self._database.one(self._sql[table].get, (key, member)) is not None

    def put(self, table: str, key: bytes, member: bytes = b"", value: Any = None) -> None:
        """Keep a value."""
        self._database.run(self._sql[table].put, (key, member, value if table in RAW else _packed(value)))

    def drop(self, table: str, key: bytes, member: bytes = b"") -> None:
        """Forget a value."""
        self._database.run(self._sql[table].drop, (key, member))

    def members(self, table: str, key: bytes) -> list[tuple[bytes, Any]]:
        """The members of a key, in order."""
        return [
            (member, self._read(table, value))
            for member, value in self._database.rows(self._sql[table].members, (key,))
        ]

    def every(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes, Any]]:
        """All of a table whose key begins so, in order."""
        for key, member, value in self._database.rows(self._sql[table].every, (prefix, prefix + _AFTER)):
            yield key, member, self._read(table, value)

    def count(self, table: str) -> int:
        """How many values there are."""
        row = self._database.one(self._sql[table].size)
        assert row is not None, "a count is always there"
        return int(row[0])

    def _read(self, table: str, kept: bytes | None) -> Any:
        try:
            raw = table in RAW or kept is None
            value = kept if raw else msgpack.unpackb(kept, use_list=False, strict_map_key=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
            raise self._database.damaged(f"a row of the table {table} cannot be read") from fault
        if not fits(SHAPES[table], value):
            raise self._database.damaged(f"a row of the table {table} holds something else")
        return value


class _Statements(NamedTuple):
    get: str
    put: str
    drop: str
    members: str
    every: str
    size: str


def _packed(value: Any) -> bytes | None:
    packed: bytes | None = None if value is None else msgpack.packb(value, use_bin_type=True)
    return packed


def refuse_network(folder: Path) -> None:
    """Raise ReplicaError where a folder lies on a file system that WAL does not work on."""
    kind = _file_system(folder)
    if kind in _NETWORK:
        raise ReplicaError(
            f"{folder}: lies on {kind}, a network file system, where processes cannot share a database safely. Keep "
            "the replica on a local disk and exchange through `crdtmerge export` and `import`."
        )


def _file_system(folder: Path) -> str | None:
    """The kind of file system of a folder, None where the system does not say."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return None
    path = folder.resolve()
    above = {str(path), *map(str, path.parents)}
    found = [(len(where), kind) for _, where, kind, *_ in map(str.split, mounts) if where in above]
    return max(found)[1] if found else None
