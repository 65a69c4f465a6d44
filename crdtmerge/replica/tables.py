"""Where an op set keeps what it knows: named tables of (key, member) -> value. In memory here, in SQLite in ``store``.

Keys and members are bytes, values are None, bool, int, str, bytes and tuples of them. A table with one value a key uses
the empty member. Listing is in the order of keys and members, so that no order of insertion can show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

Value = Any
Shape = Any

NAMES = (
    *("ops", "order", "heads", "dots", "tips", "forks"),
    *("context", "contexts", "members", "void", "recipes"),
    *("adds", "killers", "live", "retracts", "removed"),
    *("visible", "hidden", "nodes"),
)
"""Every table; ``log`` says what is in each."""

RAW = frozenset({"ops", "nodes"})
"""Tables whose values are all bytes."""

_NAMED = [(str, bytes)]

SHAPES: dict[str, Shape] = {
    **dict.fromkeys(NAMES),
    **dict.fromkeys(("ops", "nodes", "context"), bytes),
    **dict.fromkeys(("tips", "removed"), (int, bytes)),
    **dict.fromkeys(("live", "retracts"), (bytes, bool)),
    "contexts": [bytes],
    "adds": {str, None},
    "hidden": (str, bytes),
    "visible": (str, str, {str, None}, _NAMED, str, [bytes], _NAMED, {str, None}),
}
"""What the values of each table are: a type or None, a tuple of them, a list of one for a tuple of any length, a set
for one or the other."""


def fits(shape: Shape, value: Value) -> bool:
    """Whether a value is of a shape.

    >>> fits((int, bytes), (3, b"id")), fits((int, bytes), None), fits([bytes], (b"a", b"b", 3))
    (True, False, False)
    """
    if isinstance(shape, tuple):
        return type(value) is tuple and len(value) == len(shape) and all(map(fits, shape, value))
    if isinstance(shape, list):
        return type(value) is tuple and all(fits(shape[0], one) for one in value)
    if isinstance(shape, set):
        return any(fits(one, value) for one in shape)
    return value is None if shape is None else type(value) is shape


class Tables(Protocol):
    """Named tables."""

    def get(self, table: str, key: bytes, member: bytes = b"") -> Value:
        """The value, None if there is none."""
        ...

    def has(self, table: str, key: bytes, member: bytes = b"") -> bool:
        """Whether there is a value, which may be None."""
        ...

    def put(self, table: str, key: bytes, member: bytes = b"", value: Value = None) -> None:
        """Keep a value."""
        ...

    def drop(self, table: str, key: bytes, member: bytes = b"") -> None:
        """Forget a value, if there is one."""
        ...

    def members(self, table: str, key: bytes) -> list[tuple[bytes, Value]]:
        """The members of a key and their values, in order."""
        ...

    def every(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes, Value]]:
        """All (key, member, value) whose key begins so, in order."""
        ...

    def count(self, table: str) -> int:
        """How many values there are."""
        ...


class MemoryTables:
    """Tables in memory. ``copy`` copies pointers: copies share every value and inner table until one writes to it."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[bytes, dict[bytes, Value]]] = {name: {} for name in NAMES}
        self._own: set[tuple[str, bytes]] = set()

    def copy(self) -> MemoryTables:
        """An independent copy."""
        other = MemoryTables()
        other._tables = {name: dict(table) for name, table in self._tables.items()}
        self._own = set()
        return other

    def get(self, table: str, key: bytes, member: bytes = b"") -> Value:
        """The value, None if there is none."""
        return self._tables[table].get(key, {}).get(member)

    def has(self, table: str, key: bytes, member: bytes = b"") -> bool:
        """Whether there is a value."""
        return member in self._tables[table].get(key, {})

    def put(self, table: str, key: bytes, member: bytes = b"", value: Value = None) -> None:
        """Keep a value."""
        self._inner(table, key)[member] = value

    def drop(self, table: str, key: bytes, member: bytes = b"") -> None:
        """Forget a value."""
        if self.has(table, key, member):
            inner = self._inner(table, key)
            del inner[member]
            if not inner:
                del self._tables[table][key]
                self._own.discard((table, key))

    def members(self, table: str, key: bytes) -> list[tuple[bytes, Value]]:
        """The members of a key, in order."""
        return sorted(self._tables[table].get(key, {}).items())

    def every(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes, Value]]:
        """All of a table whose key begins so, in order."""
        for key in sorted(key for key in self._tables[table] if key.startswith(prefix)):
            for member, value in self.members(table, key):
                yield key, member, value

    def count(self, table: str) -> int:
        """How many values there are."""
        return sum(map(len, self._tables[table].values()))

    def _inner(self, table: str, key: bytes) -> dict[bytes, Value]:
        """The inner table of a key, one that no copy shares."""
        if (table, key) not in self._own:
            self._tables[table][key] = dict(self._tables[table].get(key, {}))
            self._own.add((table, key))
        return self._tables[table][key]
