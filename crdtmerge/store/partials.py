"""Blobs that arrive in pieces: each piece is checked before it is written, and a crash loses only the last of them.

    partial/aabb…   the pieces that are here, at their places        the table ``partials``   which these are

RULES
1. A blob's tree, its pieces' digests, hashes to its name; a piece hashes to its digest. Nothing else is written.
2. The table says that a piece is here only once it is durable: ``commit`` syncs first. That goes on beside the
   writing, which waits only where the disk falls behind: at most ``UNSYNCED_BYTES_MAX`` are not durable yet, so a
   killed process fetches no more than those again.
3. One process at a time writes a partial blob: it holds the file's lock.
4. A row or a file that is damaged, and what a sync refused, counts for nothing: those pieces are fetched again.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, InputError, StorageError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.store.blobs import Blob, Blobs
from crdtmerge.store.disk import failing
from crdtmerge.store.schema import sound
from crdtmerge.weights.descriptors import open_file
from crdtmerge.weights.digests import check_values, piece_digests, tensor_digest

_SOUND = f"digest = ? AND {sound('partials')}"
"""A damaged row counts for nothing: the blob is fetched anew."""

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
        return self.dtype.nbytes(self.shape)

    @property
    def parts(self) -> int:
        """How many pieces it has."""
        return -(-self.nbytes // limits.PIECE_BYTES)

    def piece_bytes(self, number: int) -> int:
        """Bytes of a piece; the last may be shorter."""
        return min(limits.PIECE_BYTES, self.nbytes - number * limits.PIECE_BYTES)


class Partial:
    """A blob on its way: which pieces are here, and a place for the others. Safe to use from several threads."""

    def __init__(self, tree: Tree, descriptor: int, have: bytearray, nonfinite: Bad) -> None:
        self.tree, self.descriptor = tree, descriptor
        self.have, self.nonfinite = have, nonfinite
        self.unsynced = self.users = 0
        self.closed = False

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
        self._beginning, self._committing = threading.Lock(), threading.Lock()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="crdtmerge-commit")
        self._commit: Future[None] | None = None
        self._ended = False

    def __enter__(self) -> Partials:
        return self

    def __exit__(self, *_: object) -> None:
        with self._beginning:  # what a thread still begins for a fetch that was cancelled is let go of too
            self._ended = True
        try:
            self.commit()
        finally:
            for partial in list(self._open.values()):
                self.close(partial)
            self._beside.shutdown()

    def begin(self, tree: Tree) -> Partial | None:
        """Begin a blob or go on with it; None while another process does, or after the end. Raises StorageError."""
        with self._beginning:
            if self._ended:
                return None
            if tree.digest in self._open:
                return self._open[tree.digest]
            descriptor = self._locked(tree.digest)
            if descriptor is None:
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
            partial = Partial(tree, descriptor, *known)
            with self._lock:
                self._open[tree.digest] = partial
            return partial

    def known(self, digest: bytes) -> Tree | None:
        """The tree of a blob that was begun."""
        row = self._blobs.database.one(f"SELECT dtype, shape, pieces FROM partials WHERE {_SOUND}", (digest,))
        return None if row is None else _tree(digest, *row)

    def write(self, partial: Partial, number: int, data: bytes | bytearray | memoryview) -> None:
        """Check a piece and write it. Raises FalsePeerError for wrong bytes, StorageError."""
        tree = partial.tree
        if piece_digests(data) != tree.pieces[32 * number : 32 * number + 32]:
            raise FalsePeerError(f"piece {number} of {tree.digest.hex()} holds other bytes than its name says.")
        if _has(partial.have, number):
            return
        at = number * limits.PIECE_BYTES
        bad = checked_values(data, at, tree.dtype, tree.digest)
        with self._held(partial) as held, failing(self._blobs.partial):
            if not held:
                raise _given_up(tree)
            self._blobs.disk.write(partial.descriptor, at, data)
        with self._lock:
            if not _has(partial.have, number):
                partial.have[number // 8] |= 1 << number % 8
                partial.unsynced += len(data)
                partial.nonfinite = _both(partial.nonfinite, bad)
            waiting = sum(one.unsynced for one in self._open.values())
            before = self._commit
            if before is None or before.done():
                self._commit = self._beside.submit(self.commit) if waiting >= UNSYNCED_BYTES_MAX // 2 else None
        if before is not None and (before.done() or waiting >= UNSYNCED_BYTES_MAX):
            before.result()

    def commit(self) -> None:
        """Make what was written durable and remember it. Raises StorageError."""
        with self._committing:
            with self._lock:
                dirty = [
                    (one, bytes(one.have), one.nonfinite, one.unsynced) for one in self._open.values() if one.unsynced
                ]
            rows = []
            for one, have, nonfinite, _ in dirty:
                if self._synced(one):
                    rows.append((have, _packed(nonfinite), time.time(), one.tree.digest))
            if rows:
                with self._blobs.database.transaction():
                    update = "UPDATE partials SET have = ?, nonfinite = ?, touched = ? WHERE digest = ?"
                    self._blobs.database.run_all(update, rows)
            with self._lock:
                for one, _, _, nbytes in dirty:
                    one.unsynced -= nbytes

    def finish(self, partial: Partial) -> None:
        """Turn a complete one into a blob, within a transaction. Raises StorageError."""
        tree, blobs = partial.tree, self._blobs
        assert partial.complete, "a blob is named when it is whole"
        if not self._synced(partial):
            raise _given_up(tree)
        with failing(blobs.folder):
            blob = Blob(tree.digest, tree.nbytes, tree.pieces, tree.dtype, tree.shape, partial.nonfinite, None)
            blobs.take(blob, blobs.partial / tree.digest.hex())
            blobs.disk.sync_folder(blobs.path(tree.digest).parent)
        blobs.database.run("DELETE FROM partials WHERE digest = ?", (tree.digest,))

    def close(self, partial: Partial) -> None:
        """Let go of one."""
        with self._lock:
            if not partial.closed:
                del self._open[partial.tree.digest]
                partial.closed = True
                _release(partial)

    @contextmanager
    def _held(self, partial: Partial) -> Iterator[bool]:
        """Its file stays open meanwhile, whoever lets go of it; False where that was done already."""
        with self._lock:
            held = not partial.closed
            partial.users += held
        try:
            yield held
        finally:
            with self._lock:
                partial.users -= held
                if held:
                    _release(partial)

    def _synced(self, partial: Partial) -> bool:
        """Make what was written durable; whether it was not let go of before.

        One that cannot be made durable is given up, for what a sync refused is lost. Raises StorageError.
        """
        with self._held(partial) as held:
            try:
                if held:
                    with failing(self._blobs.partial):
                        self._blobs.disk.sync(partial.descriptor)
            except StorageError:
                self.close(partial)
                raise
            return held

    def _locked(self, digest: bytes) -> int | None:
        """A descriptor of the file of a partial blob, and its lock; None while another process has that."""
        path = self._blobs.partial / digest.hex()
        with failing(self._blobs.partial):
            self._put_back(digest, path)
            descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(descriptor)
            return None

    def _put_back(self, digest: bytes, path: Path) -> None:
        """A file that was named and not entered, because a crash came between, is a partial one again."""
        named, database = self._blobs.path(digest), self._blobs.database
        if path.exists() or not named.exists():
            return
        with database.transaction():
            begun = database.one("SELECT 1 FROM partials WHERE digest = ?", (digest,))
            entered = database.one("SELECT 1 FROM blobs WHERE digest = ?", (digest,))
            if begun and not entered and named.exists():
                self._blobs.disk.rename(named, path)

    def _known(self, tree: Tree, size: int) -> tuple[bytearray, Bad] | None:
        """What an earlier process wrote, unless the file is no longer what it left."""
        row = self._blobs.database.one(f"SELECT have, nonfinite FROM partials WHERE {_SOUND}", (tree.digest,))
        if row is None:
            return None
        try:
            have, nonfinite = bytearray(row[0]), tuple(msgpack.unpackb(row[1])) if row[1] else None
        except (ValueError, TypeError, msgpack.exceptions.UnpackException):
            return None
        if len(have) != -(-tree.parts // 8):
            return None
        last = max((number for number in range(tree.parts) if _has(have, number)), default=-1)
        if last >= 0 and size < last * limits.PIECE_BYTES + tree.piece_bytes(last):
            return None
        return have, nonfinite

    def _enter(self, tree: Tree) -> None:
        database = self._blobs.database
        shape, have = msgpack.packb(list(tree.shape)), bytes(-(-tree.parts // 8))
        row = (tree.digest, tree.nbytes, tree.dtype.name, shape, tree.pieces, have, None, time.time())
        with database.transaction():
            database.run("INSERT OR REPLACE INTO partials VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._blobs.check_quota(tree.nbytes, self._quota)


def _given_up(tree: Tree) -> StorageError:
    return StorageError(f"{tree.digest.hex()} was given up while it was written; fetch it again.")


def _tree(digest: bytes, dtype: str, shape: bytes, pieces: bytes) -> Tree | None:
    """The tree in a row; None if that is damaged."""
    try:
        return Tree.of(digest, DTYPES[dtype], tuple(msgpack.unpackb(shape)), pieces)
    except (ValueError, KeyError, TypeError, FalsePeerError):
        return None


def checked_values(data: bytes | bytearray | memoryview, at: int, dtype: DType, digest: bytes) -> Bad:
    """What ``check_values`` finds. Raises FalsePeerError for values that no replica takes, so none serves them."""
    try:
        return check_values(np.frombuffer(data, np.uint8), at, dtype, f"tensor {digest.hex()}")
    except InputError as fault:
        raise FalsePeerError(str(fault)) from None


def collect_partials(blobs: Blobs, keep: set[bytes], before: float) -> int:
    """Remove partial blobs that nothing needs and nobody writes, within a transaction; how many. Raises OSError."""
    removed = 0
    rows = blobs.database.rows("SELECT digest, touched FROM partials")
    idle = [digest for digest, touched in rows if digest not in keep and touched <= before]
    strays = [path for path in blobs.partial.iterdir() if path.name not in {row[0].hex() for row in rows}]
    for path in [*(blobs.partial / digest.hex() for digest in idle), *strays]:
        removed += _remove(blobs, path)
    gone = [(digest,) for digest in idle if not (blobs.partial / digest.hex()).exists()]
    blobs.database.run_all("DELETE FROM partials WHERE digest = ?", gone)
    return removed


def _remove(blobs: Blobs, path: Path) -> bool:
    """Remove a partial blob; whether it was there and no process writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        blobs.disk.remove(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _release(partial: Partial) -> None:
    """Close its file when it is let go of and nobody uses it."""
    if partial.closed and not partial.users:
        os.close(partial.descriptor)


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
