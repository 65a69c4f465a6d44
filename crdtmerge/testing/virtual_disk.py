"""The disk of a replica in memory: what was committed survives a crash, what was not is lost, old copies can come back.

RULES, those of ``store``
1. A join or a write is committed before it is acknowledged. A crash before leaves the last commit, or this one.
2. Another place than the last writer saw, or a second place that is gone, speaks of another incarnation, or has seen
   more than the database knows: the next operation is written under a new incarnation (``store.incarnation``).
3. The second place is written before the operation is committed, so it is never behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random
from typing import NamedTuple

from crdtmerge.keys import Key
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import INCARNATION_BYTES, Add, Op, Payload
from crdtmerge.replica.opset import Joined, OpSet
from crdtmerge.replica.tables import MemoryTables


class Commit(NamedTuple):
    """What a database holds after one."""

    tables: MemoryTables
    manifests: Mapping[bytes, Manifest]
    incarnation: bytes | None
    place: int | None


class Disk:
    """What a crash leaves. ``second`` is the second place: (incarnation, sequence number)."""

    def __init__(self) -> None:
        self.commit = Commit(MemoryTables(), {}, None, None)
        self.unflushed: Commit | None = None
        self.place = 0
        self.second: tuple[bytes, int] | None = None
        self.copies: list[Commit] = []

    def flush(self) -> None:
        """What was written is durable."""
        if self.unflushed is not None:
            self.commit, self.unflushed = self.unflushed, None

    def crash(self, *, flushed: bool) -> bool:
        """Power is lost while something may be under way, which is there or not; whether it was lost."""
        lost = self.unflushed is not None and not flushed
        if flushed:
            self.flush()
        self.unflushed = None
        return lost

    def back_up(self) -> None:
        """Keep a copy of the database."""
        self.copies.append(self.commit)

    def restore(self, copy: Commit, *, elsewhere: bool, forgetful: bool) -> None:
        """Put a copy back: in another place or over the old one; the second place may be gone."""
        self.commit = copy
        self.place += elsewhere
        if forgetful:
            self.second = None


class Stored:
    """A replica on such a disk (``gossip.holding.Store``)."""

    def __init__(self, genesis: Genesis, disk: Disk, key: Key, source: Random) -> None:
        self.disk, self.key, self._random = disk, key, source
        self._tables = disk.commit.tables.copy()
        self._manifests = dict(disk.commit.manifests)
        self._incarnation, self._place = disk.commit.incarnation, disk.commit.place
        self._version = 0
        self.opset = OpSet(genesis, self._tables)

    def manifest(self, content: bytes) -> Manifest | None:
        """The manifest of a content that was added."""
        return self._manifests.get(content)

    def version(self) -> int:
        """A number that changes with every operation that is written here."""
        return self._version

    def join(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest] | None = None) -> Joined:
        """Take operations."""
        found = {**(manifests or {}), **self._manifests}
        joined = self.opset.join(ops, found)
        contents = [op.payload.content for op in joined.new if isinstance(op.payload, Add)]
        self._manifests.update((one, found[one]) for one in contents)
        if joined.new:
            self.disk.unflushed = Commit(self._tables.copy(), dict(self._manifests), self._incarnation, self._place)
        return joined

    def write(self, payload: Payload, manifests: Mapping[bytes, Manifest]) -> Op:
        """Write an operation as another process would. Raises what ``compose`` does."""
        op = self.opset.compose(self.key, self.incarnation_for_next(), payload)
        joined = self.join([op], manifests)
        assert joined.new == [op], "a replica takes what it composed"
        self._version += 1
        return op

    def incarnation_for_next(self) -> bytes:
        """The incarnation for the next operation; the second place remembers that it comes."""
        known, second = self._incarnation, self.disk.second
        tip = self.opset.tables.get("tips", self.key.public + (known or b""))
        seq = tip[0] if tip else 0
        doubt = self._place != self.disk.place or second is None or second[0] != known or second[1] > seq
        if known is None or doubt:
            known, seq = self._random.randbytes(INCARNATION_BYTES), 0
            self._incarnation, self._place = known, self.disk.place
        self.disk.second = (known, seq + 1)
        return known
