"""Blobs that arrive in pieces: each piece is checked before it is written, and a crash loses only the last of them.

    partial/aabb…   the pieces that are here, at their places        the table ``partials``   which these are

RULES
1. A blob's tree, its pieces' digests, hashes to its name; a piece hashes to its digest. Nothing else is written.
2. The table says that a piece is here only once it is durable: ``commit`` syncs first. At most ``UNSYNCED_BYTES_MAX``
   wait for that, so a killed process fetches no more than those again.
3. One process at a time writes a partial blob: it holds the file's lock.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

from crdtmerge import limits
from crdtmerge.errors import DatabaseError, FalsePeerError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.store.blobs import Blob, Blobs
from crdtmerge.store.disk import failing
from crdtmerge.weights.descriptors import open_file
from crdtmerge.weights.digests import check_values, piece_digests, tensor_digest

UNSYNCED_BYTES_MAX = 32 * limits.MIB
"""Bytes that are written and not yet durable, over all partial blobs."""

Bad = tuple[int, int] | None


class Tree(NamedTuple):
    """What a tensor's digest is made of: its dtype, shape and the digests of its pieces, joined."""

    digest: bytes
    dtype: DType
    shape: tuple[int, ...]
    pieces: bytes

    @classmethod
    def of(cls, digest: bytes, dtype: DType, shape: tuple[int, ...], pieces: bytes) -> Tree:
        """A tree that hashes to ``digest``. Raises FalsePeerError."""
        tree = cls(digest, dtype, shape, pieces)
        if len(pieces) != 32 * tree.parts or tensor_digest(dtype, shape, pieces) != digest:
            raise FalsePeerError(f"the digests of the pieces of {digest.hex()} do not hash to its name.")
        return tree

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def parts(self) -> int:
        """How many pieces it has."""
        return -(-self.nbytes // limits.PIECE_BYTES)

    def piece_bytes(self, number: int) -> int:
        """Bytes of a piece; the last may be shorter."""
        return min(limits.PIECE_BYTES, self.nbytes - number * limits.PIECE_BYTES)


def nbytes_of(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=object)) * dtype.bits // 8


class Partial:
    """A blob on its way: which pieces are here, and a place for the others. Safe to use from several threads."""

    def __init__(self, tree: Tree, descriptor: int, have: bytearray, nonfinite: Bad) -> None:
        self.tree, self.descriptor = tree, descriptor
        self.have, self.nonfinite = have, nonfinite
        self.unsynced = 0

    def lacks(self) -> list[int]:
        """The numbers of the pieces that are not here."""
        return [number for number in range(self.tree.parts) if not _has(self.have, number)]

    @property
    def done_bytes(self) -> int:
        """Bytes of the pieces that are here."""
        return self.tree.nbytes - sum(map(self.tree.piece_bytes, self.lacks()))

    @property
    def complete(self) -> bool:
        """Whether every piece is here."""
        return not self.lacks()


class Partials:
    """The partial blobs of a replica. Leaving the context commits and lets go of them."""

    def __init__(self, blobs: Blobs, quota: int | None) -> None:
        self._blobs, self._quota = blobs, quota
        self._open: dict[bytes, Partial] = {}
        self._lock = threading.Lock()
        self._committing = threading.Lock()

    def __enter__(self) -> Partials:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.commit()
        finally:
            for partial in self._open.values():
                os.close(partial.descriptor)
            self._open.clear()

    def begin(self, tree: Tree) -> Partial | None:
        """Begin a blob or go on with it; None while another process does. Raises StorageError."""
        with self._lock:
            if tree.digest in self._open:
                return self._open[tree.digest]
            path = self._blobs.partial / tree.digest.hex()
            with failing(self._blobs.partial):
                descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return None
            try:
                known = self._known(tree, os.fstat(descriptor).st_size)
                if known is None:
                    self._blobs.check_space(tree.nbytes)
                    known = bytearray(-(-tree.parts // 8)), None
                    self._enter(tree)
                    with failing(self._blobs.partial):
                        self._blobs.disk.sync_folder(self._blobs.partial)
            except BaseException:
                os.close(descriptor)
                raise
            self._open[tree.digest] = Partial(tree, descriptor, *known)
            return self._open[tree.digest]

    def known(self, digest: bytes) -> Tree | None:
        """The tree of a blob that was begun."""
        row = self._blobs.database.one("SELECT dtype, shape, pieces FROM partials WHERE digest = ?", (digest,))
        return None if row is None else _tree(digest, *row)

    def write(self, partial: Partial, number: int, data: bytes | bytearray | memoryview) -> None:
        """Check a piece and write it. Raises FalsePeerError for wrong bytes, StorageError."""
        tree = partial.tree
        if piece_digests(data) != tree.pieces[32 * number : 32 * number + 32]:
            raise FalsePeerError(f"piece {number} of {tree.digest.hex()} holds other bytes than its name says.")
        at = number * limits.PIECE_BYTES
        bad = check_values(np.frombuffer(data, np.uint8), at, tree.dtype, f"tensor {tree.digest.hex()}")
        with failing(self._blobs.partial):
            self._blobs.disk.write(partial.descriptor, at, data)
        with self._lock:
            if not _has(partial.have, number):
                partial.have[number // 8] |= 1 << number % 8
                partial.unsynced += len(data)
                partial.nonfinite = _both(partial.nonfinite, bad)
            waiting = sum(one.unsynced for one in self._open.values())
        if waiting >= UNSYNCED_BYTES_MAX:
            self.commit()

    def commit(self) -> None:
        """Make what was written durable and remember it. Raises StorageError."""
        with self._committing:
            with self._lock:
                dirty = [
                    (one, one.descriptor, bytes(one.have), one.nonfinite, one.unsynced)
                    for one in self._open.values()
                    if one.unsynced
                ]
            rows = []
            with failing(self._blobs.partial):
                for one, descriptor, have, nonfinite, _ in dirty:
                    self._blobs.disk.sync(descriptor)
                    rows.append((have, _packed(nonfinite), time.time(), one.tree.digest))
            if rows:
                with self._blobs.database.transaction():
                    update = "UPDATE partials SET have = ?, nonfinite = ?, touched = ? WHERE digest = ?"
                    self._blobs.database.run_all(update, rows)
            with self._lock:
                for one, _, _, _, nbytes in dirty:
                    one.unsynced -= nbytes

    def finish(self, partial: Partial) -> None:
        """Turn a complete one into a blob, within a transaction. Raises StorageError."""
        tree, blobs = partial.tree, self._blobs
        assert partial.complete, "a blob is named when it is whole"
        with failing(blobs.folder):
            blobs.disk.sync(partial.descriptor)
            blob = Blob(tree.digest, tree.nbytes, tree.pieces, tree.dtype, tree.shape, partial.nonfinite, None)
            blobs.take(blob, blobs.partial / tree.digest.hex())
            blobs.disk.sync_folder(blobs.path(tree.digest).parent)
        blobs.database.run("DELETE FROM partials WHERE digest = ?", (tree.digest,))

    def close(self, partial: Partial) -> None:
        """Let go of one."""
        with self._committing, self._lock:
            if self._open.pop(partial.tree.digest, None) is not None:
                os.close(partial.descriptor)

    def _known(self, tree: Tree, size: int) -> tuple[bytearray, Bad] | None:
        """What an earlier process wrote, unless the file is no longer what it left."""
        row = self._blobs.database.one("SELECT have, nonfinite FROM partials WHERE digest = ?", (tree.digest,))
        if row is None:
            return None
        have = bytearray(row[0])
        if len(have) != -(-tree.parts // 8):
            raise DatabaseError("the row of a partial blob is damaged. Run `crdtmerge fsck --mend`.")
        last = max((number for number in range(tree.parts) if _has(have, number)), default=-1)
        if last >= 0 and size < last * limits.PIECE_BYTES + tree.piece_bytes(last):
            return None
        return have, tuple(msgpack.unpackb(row[1])) if row[1] else None

    def _enter(self, tree: Tree) -> None:
        database = self._blobs.database
        shape, have = msgpack.packb(list(tree.shape)), bytes(-(-tree.parts // 8))
        row = (tree.digest, tree.nbytes, tree.dtype.name, shape, tree.pieces, have, None, time.time())
        with database.transaction():
            database.run("INSERT OR REPLACE INTO partials VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._blobs.check_quota(tree.nbytes, self._quota)


def _tree(digest: bytes, dtype: str, shape: bytes, pieces: bytes) -> Tree | None:
    """The tree in a row; None if that is damaged."""
    try:
        return Tree.of(digest, DTYPES[dtype], tuple(msgpack.unpackb(shape)), pieces)
    except (ValueError, KeyError, TypeError, FalsePeerError):
        return None


def collect_partials(blobs: Blobs, keep: set[bytes], before: float) -> int:
    """Remove partial blobs that nothing needs and nobody writes, within a transaction; how many. Raises OSError."""
    removed = 0
    rows = blobs.database.rows("SELECT digest, touched FROM partials")
    idle = [digest for digest, touched in rows if digest not in keep and touched <= before]
    strays = [path for path in blobs.partial.iterdir() if path.name not in {row[0].hex() for row in rows}]
    for path in [*(blobs.partial / digest.hex() for digest in idle), *strays]:
        if _is_free(path):
            blobs.disk.remove(path)
            removed += 1
    blobs.database.run_all("DELETE FROM partials WHERE digest = ?", [(digest,) for digest in idle])
    return removed


def _is_free(path: Any) -> bool:
    """Whether no process writes a partial blob."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def runs(numbers: Iterable[int], longest: int) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as (first, one past the last), at most ``longest`` of them together.

    >>> list(runs([0, 1, 2, 5], 2))
    [(0, 2), (2, 3), (5, 6)]
    """
    begin = end = -1
    for number in numbers:
        if number == end and end - begin < longest:
            end += 1
            continue
        if begin >= 0:
            yield begin, end
        begin, end = number, number + 1
    if begin >= 0:
        yield begin, end


def _has(have: bytes | bytearray, number: int) -> bool:
    return bool(have[number // 8] >> number % 8 & 1)


def _both(one: Bad, other: Bad) -> Bad:
    return (one[0] + other[0], min(one[1], other[1])) if one and other else one or other


def _packed(nonfinite: Bad) -> bytes | None:
    packed: bytes | None = msgpack.packb(list(nonfinite)) if nonfinite else None
    return packed
